"""Every registered channel mixer keeps the contract."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.codec import decode, encode
from plait.configs.mesh import MeshConfig
from plait.kernels import Tokens
from plait.kernels.target import target
from plait.models.build import BuildContext
from plait.models.channel_mixers.base import CHANNEL_MIXERS, ChannelMixer, ChannelMixerConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.layers.linear import dense_layers
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.train import mesh as meshes

WIDTH, BATCH, LENGTH = 64, 4, 12
SEGMENTS = np.ones((BATCH, LENGTH), np.int32)
SEGMENTS[0, 5:] = 2
SEGMENTS[1, 7:] = 0
SEGMENTS[2] = 0
REAL = SEGMENTS > 0
AT, WHOLE = Tokens(segment_ids=jnp.asarray(SEGMENTS)), Tokens(segment_ids=jnp.ones((BATCH, LENGTH), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Case:
    config: ChannelMixerConfig
    sigma_reparam: str | None = None

    def create(self, dtype: str = "float32") -> ChannelMixer:
        context = BuildContext(rngs=nnx.Rngs(1), seq_len=LENGTH, compute_dtype=jnp.dtype(dtype), sigma_reparam=self.sigma_reparam)
        return self.config.build(WIDTH, context)


@functools.cache
def _variables(case: Case) -> nnx.State:
    return quick_jit(lambda: nnx.split(case.create())[1])()


def _cases() -> dict[str, Case]:
    cases = {name: Case(config.example()) for name, config in CHANNEL_MIXERS.all().items()}
    cases |= {f"{name}-spectral": Case(case.config, "spectral") for name, case in cases.items()}
    deepseek = MoEConfig(num_experts=4, top_k=3, hidden_dim=32, scores="sigmoid", balance_bias=0.1, routed_scale=2.5)
    return {
        **cases,
        "moe-sigmoid-bias": Case(deepseek),
        "moe-grouped-gated": Case(dataclasses.replace(deepseek, top_k=2, num_groups=2, num_shared_experts=1, shared_gate=True)),
        "moe-biases-clamped": Case(
            MoEConfig(num_experts=4, hidden_dim=32, swiglu_limit=0.2, use_bias=True, router_bias=True, num_shared_experts=1)
        ),
        "moe-nemotron": Case(dataclasses.replace(deepseek, gated=False, activation="relu2", latent_dim=24, use_bias=True)),
        "mlp-token_shift": Case(MLPConfig(hidden_dim=48, activation="relu2", use_bias=False, token_shift=True)),
        "gated_mlp-multiplied": Case(GatedMLPConfig(hidden_dim=48, use_bias=True, multipliers=(0.5, 2.0))),
        "moe-scores-as-gates": Case(dataclasses.replace(MoEConfig.example(), normalize=False)),
    }


CASES = _cases()


class Subject:
    """A case, its variables and its compiled functions."""

    def __init__(self, case: Case):
        self.case, self.config = case, case.config
        self.variables = _variables(case)
        self.graph = nnx.split(nnx.eval_shape(case.create))[0]
        self.mixer = nnx.merge(self.graph, self.variables)
        self.x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
        self.pull = quick_jit(functools.partial(self.gradients, self.graph))

    @staticmethod
    def gradients(graph, variables, x, at, cotangent):
        """What the mixer gives, and the gradients of `y . cotangent` and of its losses in the parameters and in `x`."""
        params, rest = nnx.split_state(variables, nnx.Param, ...)

        def total(params, x):
            mixed = nnx.merge(graph, nnx.merge_state(params, rest))(x, at=at)
            return (mixed.y * cotangent).sum().astype(jnp.float32) + sum(mixed.losses.values()), mixed

        (_, mixed), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)
        return mixed, *gradients

    def call(self, x, at):
        return self.pull(self.variables, x, at, jnp.ones_like(x))


subject_of = functools.cache(Subject)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def subject(request) -> Subject:
    return subject_of(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_has_the_input_shape_and_the_compute_dtype_and_the_rest_is_float32(subject, dtype):
    graph = nnx.split(nnx.eval_shape(lambda: subject.case.create(dtype)))[0]
    x = jax.ShapeDtypeStruct((3, 5, WIDTH), dtype)
    mixed = jax.eval_shape(lambda v, x: nnx.merge(graph, v)(x, at=Tokens()), subject.variables, x)
    assert (mixed.y.shape, mixed.y.dtype) == (x.shape, x.dtype)
    assert all((loss.shape, loss.dtype) == ((), jnp.float32) for loss in mixed.losses.values())
    assert {leaf.dtype for leaf in jax.tree.leaves((mixed.observed, mixed.counts))} <= {jnp.dtype("float32")}


def test_padding_is_inert_and_counts_for_nothing(subject):
    mixed, *_ = subject.call(subject.x, AT)
    other, *_ = subject.call(jnp.where(REAL[..., None], subject.x, 50.0), AT)
    np.testing.assert_array_equal(mixed.y[REAL], other.y[REAL])
    assert np.isfinite(other.y).all()
    for name in ("losses", "observed", "counts"):
        jax.tree.map(np.testing.assert_array_equal, getattr(mixed, name), getattr(other, name))
    cotangent = jnp.asarray(np.broadcast_to(REAL[..., None], subject.x.shape), jnp.float32)
    assert not subject.pull(subject.variables, subject.x, AT, cotangent)[2][~REAL].any()


def test_batch_of_padding_is_finite(subject):
    out = subject.call(subject.x, Tokens(segment_ids=jnp.zeros((BATCH, LENGTH), jnp.int32)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_each_token_alone_equals_the_call(subject):
    """What decoding relies on: a token's output is the same in whatever company, but for what the state says of those before."""
    whole, *_ = subject.call(subject.x, WHOLE)
    advance = lambda at: quick_jit(lambda variables, x, state: nnx.merge(subject.graph, variables).advance(x, state, at=at))
    prompt, new = LENGTH // 2, jnp.zeros((BATCH, 2, WIDTH))
    padded = jnp.concatenate([new + 50.0, subject.x[:, :prompt]], axis=1)
    left = Tokens(segment_ids=jnp.broadcast_to(jnp.arange(2 + prompt) >= 2, (BATCH, 2 + prompt)).astype(jnp.int32))
    empty = subject.mixer.init_state(BATCH)
    assert sum(a.nbytes for a in jax.tree.leaves(empty)) == BATCH * subject.config.state_bytes(WIDTH, "float32")
    y, state = advance(left)(subject.variables, padded, empty)
    assert_close(y[:, 2:], whole.y[:, :prompt])
    step = advance(Tokens())
    for t in range(prompt, LENGTH):
        y, state = step(subject.variables, subject.x[:, t : t + 1], state)
        assert_close(y, whole.y[:, t : t + 1])


def test_gradients_are_finite_in_bfloat16(subject):
    graph = nnx.split(nnx.eval_shape(lambda: subject.case.create("bfloat16")))[0]
    x = subject.x.astype(jnp.bfloat16)
    out = quick_jit(functools.partial(Subject.gradients, graph))(subject.variables, x, AT, jnp.ones_like(x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_flops_equal_the_products_of_the_traced_call(subject):
    if subject.case.sigma_reparam is not None:
        pytest.skip("sigmaReparam's products are not a token's")
    with target("v5e"):
        call = jax.make_jaxpr(lambda v, x: nnx.merge(subject.graph, v)(x, at=Tokens()).y)(subject.variables, subject.x)
    assert subject.config.flops(WIDTH) == pytest.approx(products(call.jaxpr) / (BATCH * LENGTH), rel=1e-12)


def products(jaxpr) -> float:
    """2 per multiply-add of matrix products, rows by group included."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "ragged_dot_general":
            total += 2.0 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[1]
        else:
            inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())
            total += sum(products(one) for one in inner if hasattr(one, "eqns"))
    return total


def test_num_params_equals_the_initialised_tree(subject):
    params = jax.tree.leaves(nnx.state(subject.mixer, nnx.Param))
    gains = sum(layer.gain[...].size for _, layer in dense_layers(subject.mixer) if layer.gain is not None)  # the model's option
    assert subject.config.num_params(WIDTH) == sum(p.size for p in params) - gains


def test_config_survives_json_and_is_hashable(subject):
    again = decode(ChannelMixerConfig, json.loads(json.dumps(encode(subject.config))))
    assert again == subject.config
    assert hash(again) == hash(subject.config)


def test_spectral_norms_are_the_gains(subject):
    for path, layer in dense_layers(subject.mixer) if subject.case.sigma_reparam else ():
        layer.gain[...] = jnp.full_like(layer.gain[...], 0.5)
        norms = np.linalg.svd(np.asarray(layer.weight(), np.float64), compute_uv=False)[..., 0]
        assert norms == pytest.approx(np.full(norms.shape, 0.5), rel=0.01), path  # what the power iteration promises


MESHES = {
    "expert fsdp tensor": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
    "expert context": MeshConfig(data=1, expert=4, context=2),
    "data tensor": MeshConfig(data=4, tensor=2),
}


SPREAD = ("gated_mlp", "mlp-token_shift", "moe", "moe-grouped-gated")
"""Cases that are laid over every mesh by default: dense, with the token before, routed, routed by groups beside a shared expert."""


@pytest.mark.parametrize(
    ("subject", "mesh"),
    [
        pytest.param(
            case, mesh, id=f"{name}-{cut}", marks=[] if name in SPREAD or cut == "expert fsdp tensor" else pytest.mark.slow
        )
        for name, case in CASES.items()
        for cut, mesh in MESHES.items()
    ],
    indirect=["subject"],
)
def test_eight_devices_equal_one(subject, mesh):
    mesh = meshes.make_mesh(mesh)
    placed = []
    for path, variable in nnx.to_flat_state(subject.variables):
        where = meshes.sharding(mesh, variable.get_metadata()["axes"], variable.shape, str(path))
        placed.append((path, variable.replace(jax.device_put(variable[...], where))))
    rows = meshes.batch_sharding(mesh, BATCH, LENGTH, 1)

    def run(variables, x, at, cotangent):
        with meshes.on_mesh(mesh):
            return Subject.gradients(subject.graph, variables, x, at, cotangent)

    x, at, cotangent = (jax.device_put(a, rows) for a in (subject.x, AT.segment_ids, jnp.cos(subject.x)))
    found = quick_jit(run)(nnx.from_flat_state(placed), x, Tokens(segment_ids=at), cotangent)
    expected = subject.pull(subject.variables, subject.x, AT, jnp.cos(subject.x))
    assert len(found[0].y.sharding.device_set) == 8
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))

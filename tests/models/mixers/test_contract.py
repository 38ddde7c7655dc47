"""The mixer contract, over every registered mixer: what a new file in `models/mixers` must keep, tested without an edit here."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from plait.configs.codec import decode, encode
from plait.configs.mesh import MeshConfig
from plait.kernels import dispatch
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS, HeadMixer, Mixer, MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.moh import MoHConfig
from plait.configs.probe import ProbeConfig
from plait.tests.models import common
from plait.tests.models.common import layout, left_padded, quick_jit
from plait.tests.tolerances import assert_close
from plait.train import mesh as meshes

WIDTH, BATCH, LENGTH = 64, 2, 72  # two chunks of the linear layers, the second one partly filled
PROMPTS, STEPS = (48, 13), 24  # prompt lengths, padded left to the longest, and tokens decoded after them
SEGMENTS = (20, 33, 12)  # documents of the packed row; the rest of it is padding
PROBE = ProbeConfig(rows=16, sequences=4, first_k=3)
MESH = meshes.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))


@dataclasses.dataclass(frozen=True)
class Case:
    """One mixer under test."""

    config: MixerConfig
    sigma_reparam: str | None = None

    def build(self, compute_dtype: str = "float32") -> Mixer:
        """The module, new."""
        ctx = BuildContext(
            layer_index=1,
            num_layers=4,
            rngs=nnx.Rngs(0),
            seq_len=LENGTH,
            compute_dtype=jnp.dtype(compute_dtype),
            sigma_reparam=self.sigma_reparam,
        )
        return self.config.build(WIDTH, ctx)

    def graph(self, compute_dtype: str) -> nnx.GraphDef:
        """The module without its variables."""
        return nnx.split(nnx.eval_shape(lambda: self.build(compute_dtype)))[0]

    def variables(self) -> nnx.State:
        """Its variables, moved off their initial values so that zeros, ones and symmetries hide nothing."""
        variables = quick_jit(lambda: nnx.split(self.build())[1])()
        params, rest = nnx.split_state(variables, nnx.Param, ...)
        rng = np.random.default_rng(1)
        move = lambda a: a + ((0.1 * np.std(a) + 0.02) * rng.normal(size=a.shape)).astype(np.float32)  # noqa: E731
        return nnx.merge_state(jax.tree.map(move, params), rest)


def fits_moh(config: MixerConfig) -> bool:
    """Whether Mixture-of-Head can wrap it; its own example shows it on softmax attention."""
    mixer = nnx.eval_shape(Case(config).build)
    return isinstance(mixer, HeadMixer) and mixer.num_heads > 1 and config != MoHConfig.example().mixer


def _cases() -> dict[str, Case]:
    softmax = functools.partial(SoftmaxConfig, num_heads=4, head_dim=16)
    gated_deltanet = functools.partial(GatedDeltaNetConfig, num_heads=2, head_dim=8)
    examples = {name: config.example() for name, config in MIXERS.all().items()}
    plain = {name: config for name, config in examples.items() if not hasattr(config, "mixer")}
    configs = {
        **examples,
        **{f"moh+{name}": MoHConfig(mixer=config) for name, config in plain.items() if fits_moh(config)},
        "softmax-gqa": softmax(num_kv_heads=2),
        "softmax-nope": softmax(rope_theta=None),
        "softmax-qk_norm": softmax(qk_norm=True),
        "softmax-window": softmax(window_size=8),
        "softmax-window-sinks": softmax(window_size=8, num_sink_tokens=2),
        "softmax-sink_logits": softmax(num_kv_heads=1, sink_logits=True),
        "softmax-gate": softmax(gate="elementwise"),
        "softmax-headwise_gate": softmax(gate="headwise"),
        "softmax-sigmoid": softmax(normalizer="sigmoid"),
        "gated_deltanet-grouped": gated_deltanet(num_v_heads=4),
        "gated_deltanet-negative": gated_deltanet(negative_eigenvalues=True),
        "moh+softmax-gqa-routed": MoHConfig(mixer=softmax(num_kv_heads=2), num_shared_heads=0, top_k=3),
    }
    cases = {name: Case(config) for name, config in configs.items()}
    for name, config in examples.items():
        cases |= {f"{name}-{kind}": Case(config, kind) for kind in ("spectral", "one")}
    return cases


CASES = _cases()


class Program:
    """The compiled functions of a module's graph; cases that differ in values only share them."""

    def __init__(self, graph: nnx.GraphDef):
        self.graph = graph
        self.pull = quick_jit(self._pull)
        self.steps = quick_jit(self._steps)
        self.prefill = quick_jit(lambda variables, *args, **where: self.mixer(variables).prefill(*args, **where))
        self.probe = quick_jit(lambda variables, x, **where: self.mixer(variables)(x, **where, probe=PROBE))
        self.heads = quick_jit(self._heads)
        self.sharded = quick_jit(self._sharded)

    def mixer(self, variables: nnx.State) -> Mixer:
        return nnx.merge(self.graph, variables)

    def _pull(self, variables, x, where, cotangent):
        """`y`, and the gradients of `y . cotangent` in the parameters and in `x`."""
        params, rest = nnx.split_state(variables, nnx.Param, ...)
        y, pull = jax.vjp(lambda params, x: self.mixer(nnx.merge_state(params, rest))(x, **where)[0], params, x)
        return y, *pull(cotangent)

    def _steps(self, variables, state, x, positions):
        """`y [B, n, D]` of n steps, and the state after them."""

        def body(state, token):
            y, state = self.mixer(variables).step(token[0], state, positions=token[1])
            return state, y

        state, y = jax.lax.scan(body, state, (x.swapaxes(0, 1), positions.swapaxes(0, 1)))
        return y.swapaxes(0, 1), state

    def _heads(self, variables, x, where):
        """Implied attention, values and head outputs."""
        mixer = self.mixer(variables)
        inputs, _ = mixer.project(x, **where, state=None)
        return mixer.implied_attention(x, **where), inputs.v, mixer.attend(inputs, **where, state=None)[0]

    def _sharded(self, variables, x, where):
        with meshes.on_mesh(MESH):
            return self.mixer(variables)(x, **where)[0]


program = functools.cache(Program)


class Subject:
    """A case, its variables and its program."""

    def __init__(self, case: Case):
        self.case, self.config, self.variables = case, case.config, case.variables()
        self.program = program(case.graph("float32"))
        self.mixer = self.program.mixer(self.variables)
        self.x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))

    def call(self, x: jax.Array, where: dict[str, jax.Array]) -> jax.Array:
        return self.program.pull(self.variables, x, where, jnp.zeros_like(x))[0]

    def gradient(self, where: dict[str, jax.Array], cotangent: jax.Array) -> np.ndarray:
        """Of `y . cotangent` in `x`; finite."""
        gradient = self.program.pull(self.variables, self.x, where, cotangent)[2]
        assert np.isfinite(gradient).all()
        return np.asarray(gradient)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def subject(request) -> Subject:
    return Subject(request.param)


@pytest.fixture
def plain_subject(subject) -> Subject:
    if subject.case.sigma_reparam is not None:
        pytest.skip("says nothing of the projections, of which alone sigmaReparam is a property")
    return subject


layout = functools.partial(layout, length=LENGTH)
WHOLE = layout((LENGTH,), (LENGTH,))
PACKED = layout(SEGMENTS, (LENGTH - 1,))
REAL = np.asarray(PACKED["segment_ids"] > 0)


def at_token(t: int) -> jax.Array:
    """A cotangent of ones at token `t` of each row."""
    return jnp.zeros((BATCH, LENGTH, WIDTH)).at[:, t].set(1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_has_the_input_shape_and_the_compute_dtype(subject, dtype):
    x, where = jax.ShapeDtypeStruct((3, 5, WIDTH), dtype), common.layout((5,), (5,), (5,), length=5)
    y, _ = jax.eval_shape(lambda v, x: nnx.merge(subject.case.graph(dtype), v)(x, **where), subject.variables, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_no_gradient_comes_from_the_future_and_some_from_the_past(subject):
    for t in (0, 20, 63, 64, LENGTH - 1):
        matters = (subject.gradient(WHOLE, at_token(t)) != 0).any(-1)
        assert not matters[:, t + 1 :].any(), t
        assert matters[:, t].all(), t
        assert t == 0 or matters[:, :t].any(), t


def test_nothing_crosses_documents(subject):
    ids = np.asarray(PACKED["segment_ids"])[0]
    for t in (0, 19, 20, 52, 53, 64):  # first and last tokens of the packed row's documents
        matters = (subject.gradient(PACKED, at_token(t))[0] != 0).any(-1)
        assert not matters[ids != ids[t]].any(), t
        assert matters[t], t


def test_packed_documents_equal_separate_ones(subject):
    y = subject.call(subject.x, PACKED)
    start = 0
    for size in SEGMENTS:
        alone = jnp.zeros_like(subject.x).at[:, :size].set(subject.x[:1, start : start + size])
        expected = subject.call(alone, layout((size,), (size,)))
        assert_close(y[0, start : start + size], expected[0, :size])
        start += size


def test_padding_is_inert(subject):
    y = subject.call(subject.x, PACKED)
    changed = subject.call(jnp.where(REAL[..., None], subject.x, 50.0), PACKED)
    np.testing.assert_array_equal(y[REAL], changed[REAL])
    assert np.isfinite(changed).all()
    cotangent = jnp.asarray(np.broadcast_to(REAL[..., None], subject.x.shape), jnp.float32)
    assert not subject.gradient(PACKED, cotangent)[~REAL].any()


def test_row_of_padding_is_finite(subject):
    y, *gradients = subject.program.pull(subject.variables, subject.x, layout((), (LENGTH,)), jnp.ones_like(subject.x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))


def test_repeated_step_equals_the_call(subject):
    state, outputs = subject.mixer.init_state(BATCH, LENGTH), []
    for start in range(0, LENGTH, STEPS):
        positions = jnp.broadcast_to(jnp.arange(start, start + STEPS), (BATCH, STEPS))
        y, state = subject.program.steps(subject.variables, state, subject.x[:, start : start + STEPS], positions)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), subject.call(subject.x, WHOLE))


def test_prefill_of_left_padded_prompts_then_step_equals_the_call(subject):
    where, slots = left_padded(*PROMPTS)
    prompts = jnp.take_along_axis(subject.x, slots[..., None], axis=1)
    y, state = subject.program.prefill(subject.variables, prompts, subject.mixer.init_state(BATCH, LENGTH), **where)
    after = jnp.asarray(PROMPTS)[:, None] + jnp.arange(STEPS)[None]
    rest = jnp.take_along_axis(subject.x, after[..., None], axis=1)
    stepped, _ = subject.program.steps(subject.variables, state, rest, after)
    expected = subject.call(subject.x, layout(*[(n + STEPS,) for n in PROMPTS]))
    for row, n in enumerate(PROMPTS):
        assert_close(y[row, max(PROMPTS) - n :], expected[row, :n])
        assert_close(stepped[row], expected[row, n : n + STEPS])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_keeps_its_shape_and_has_the_stated_bytes(subject, dtype):
    def states(variables, x):
        mixer = nnx.merge(subject.case.graph(dtype), variables)
        empty = mixer.init_state(BATCH, LENGTH)
        _, filled = mixer.prefill(x, empty, **common.layout((5,), (5,), length=5))
        _, stepped = mixer.step(x[:, 0], filled, positions=jnp.full(BATCH, 5))
        return empty, filled, stepped

    x = jax.ShapeDtypeStruct((BATCH, 5, WIDTH), dtype)
    empty, filled, stepped = jax.eval_shape(states, subject.variables, x)
    assert empty == filled == stepped
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(empty))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(empty))
    assert size == BATCH * subject.config.state_bytes(WIDTH, LENGTH, dtype)


def test_num_params_equals_the_initialised_tree(subject):
    params = jax.tree.leaves(nnx.state(subject.mixer, nnx.Param))
    gains = sum(p.ndim == 0 for p in params) if subject.case.sigma_reparam else 0  # those belong to the model's option
    assert subject.config.num_params(WIDTH) == sum(p.size for p in params) - gains


def test_flops_equal_the_products_of_traced_steps(plain_subject, monkeypatch):
    for op in dispatch._ops.values():
        monkeypatch.setattr(op, "implementations", {"reference": op.implementations["reference"]})

    def step(variables, x, max_len):
        mixer = plain_subject.program.mixer(variables)
        return mixer.step(x, mixer.init_state(1, max_len), positions=jnp.zeros(1, jnp.int32))

    @functools.cache
    def count(max_len: int) -> float:
        jaxpr = jax.make_jaxpr(functools.partial(step, max_len=max_len))(plain_subject.variables, jnp.zeros((1, WIDTH)))
        return traced_flops(jaxpr.jaxpr)

    # Token t reads the memory of a sequence of t tokens, so the mean over a sequence is the causal mean.
    length, seen = 12, {}
    for t in range(1, length + 1):
        seen.setdefault(plain_subject.config.state_bytes(WIDTH, t, "float32"), t)
    counts = [count(seen[plain_subject.config.state_bytes(WIDTH, t, "float32")]) for t in range(1, length + 1)]
    assert plain_subject.config.flops(WIDTH, length) == pytest.approx(np.mean(counts), rel=1e-12)


def traced_flops(jaxpr) -> float:
    """2 per multiply-add of matrix products, convolutions and outer products; loop lengths multiplied in."""
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * out.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2.0 * out.size * math.prod(eqn.invars[1].aval.shape[:-1])
        elif eqn.primitive.name == "mul" and all(out.size > operand.aval.size for operand in eqn.invars):
            total += 2.0 * out.size
        else:
            inner = sum(traced_flops(getattr(j, "jaxpr", j)) for j in jaxprs_in_params(eqn.params))
            total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def test_implied_attention_reproduces_the_head_outputs(plain_subject):
    if not isinstance(plain_subject.mixer, HeadMixer):
        with pytest.raises(NotImplementedError, match="implied attention"):
            plain_subject.mixer.implied_attention(plain_subject.x, **PACKED)
        return
    a, v, o = plain_subject.program.heads(plain_subject.variables, plain_subject.x, PACKED)
    assert (a.shape, a.dtype) == ((BATCH, plain_subject.config.head_count(WIDTH), LENGTH, LENGTH), jnp.float32)
    v = jnp.repeat(v, a.shape[1] // v.shape[2], axis=2)
    assert_close(jnp.einsum("bhts,bshv->bthv", a, v)[REAL], o[REAL])
    ids = np.asarray(PACKED["segment_ids"])
    visible = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None] & np.tri(LENGTH, dtype=bool)[None]
    assert not np.moveaxis(np.asarray(a), 1, -1)[~visible].any()


def test_eight_devices_equal_one(subject):
    placed = []
    for path, variable in nnx.to_flat_state(subject.variables):
        sharding = meshes.sharding(MESH, variable.get_metadata()["axes"], variable.shape, str(path))
        placed.append((path, variable.replace(jax.device_put(variable[...], sharding))))
    rows = meshes.batch_sharding(MESH, 2 * BATCH, 64, 1)
    twice = lambda a: jax.device_put(jnp.concatenate([a, a]), rows)  # noqa: E731
    y = subject.program.sharded(nnx.from_flat_state(placed), twice(subject.x), jax.tree.map(twice, PACKED))
    assert len(y.sharding.device_set) == 8
    expected = subject.call(subject.x, PACKED)
    assert_close(y[:BATCH][REAL], expected[REAL])
    assert_close(y[BATCH:][REAL], expected[REAL])


def test_config_survives_json_and_is_hashable(plain_subject):
    again = decode(MixerConfig, json.loads(json.dumps(encode(plain_subject.config))))
    assert again == plain_subject.config
    assert hash(again) == hash(plain_subject.config)


def test_gradients_are_finite_in_bfloat16(subject):
    half = program(subject.case.graph("bfloat16"))
    x = subject.x[:, :24].astype(jnp.bfloat16)
    y, *gradients = half.pull(subject.variables, x, common.layout((11, 9), (24,), length=24), jnp.ones_like(x))
    assert y.dtype == jnp.bfloat16
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))


def test_probe_shows_finite_statistics_of_the_right_shape_and_changes_nothing(plain_subject):
    y, stats = plain_subject.program.probe(plain_subject.variables, plain_subject.x, **PACKED)
    assert_close(y[REAL], plain_subject.call(plain_subject.x, PACKED)[REAL])
    heads = plain_subject.config.head_count(WIDTH)
    shown = {name: value for name, value in vars(stats).items() if value is not None}
    shapes = {"sink": (heads, PROBE.first_k), "auxiliary_loss": ()}
    for name, value in shown.items():
        assert (value.shape, value.dtype) == (shapes.get(name, (heads,)), jnp.float32), name
        assert np.isfinite(value).all(), name
    if isinstance(plain_subject.mixer, HeadMixer):
        assert {"entropy", "entropy_ratio", "sink", "sink_rate", "value_drain"} <= set(shown)
    assert (plain_subject.config.kind != "linear") or {"state_norm", "write_strength"} <= set(shown)


def test_statistics_do_not_see_padding(plain_subject):
    _, stats = plain_subject.program.probe(plain_subject.variables, plain_subject.x, **PACKED)
    other = jnp.where(REAL[..., None], plain_subject.x, 5.0)
    _, changed = plain_subject.program.probe(plain_subject.variables, other, **PACKED)
    for name, value in vars(stats).items():
        np.testing.assert_array_equal(getattr(changed, name), value, err_msg=name)


def test_statistics_do_not_see_rows_of_padding(plain_subject):
    x = jnp.stack([plain_subject.x[0], plain_subject.x[0]])
    _, both = plain_subject.program.probe(plain_subject.variables, x, **layout(SEGMENTS, SEGMENTS))
    _, one = plain_subject.program.probe(plain_subject.variables, x, **layout(SEGMENTS, ()))
    for name, value in vars(both).items():
        if value is not None:
            assert_close(getattr(one, name), value, err_msg=name)

"""What implementations of the recurrent mixers are known to get wrong, a test each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.kernels.shapes import l2_normalize
from plait.models.build import PRODUCTS, Buffer, BuildContext
from plait.models.layers.decays import LowerBound, log_uniform_rate
from plait.models.mixers.linear.deltanet import DeltaNetConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gated_deltaproduct import GatedDeltaProductConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lightnet import LightNetConfig
from plait.models.mixers.linear.lightning import LightningConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.mixers.linear.layers import (
    AT,
    LENGTH,
    WIDTH,
    attend,
    build,
    forward,
    hidden,
    jitted,
    kernel,
    project,
    set_to,
)
from plait.tests.tolerances import assert_close

MINE = {
    "gla": GLAConfig(num_heads=2),
    "mamba2": Mamba2Config(head_dim=16, state_dim=4),
    "lightning": LightningConfig(head_dim=8, lrpe=True),
    "hgrn2": HGRN2Config(head_dim=8),
    "deltanet": DeltaNetConfig(head_dim=8),
    "gated_deltanet": GatedDeltaNetConfig(num_heads=2, head_dim=8),
    "gated_deltaproduct": GatedDeltaProductConfig(num_heads=2, head_dim=8),
    "kda": KDAConfig(head_dim=8),
    "kda-bounded": KDAConfig(head_dim=8, lower_bound=-5.0),
    "lightnet": LightNetConfig(head_dim=8, gate_rank=4, tpe=True, lrpe=True),
}
CTX = BuildContext(layer_index=1, num_layers=4, rngs=nnx.Rngs(0), seq_len=LENGTH)
DELTA = ("deltanet", "gated_deltanet", "gated_deltaproduct", "kda")


def read(seed: int, heads: int, dim: int) -> jax.Array:
    """Something that heads might have read, of all sizes."""
    return 10 * jax.random.normal(jax.random.key(seed), (1, LENGTH, heads, dim))


def root_mean_square(y) -> np.ndarray:
    return np.sqrt(np.mean(np.square(np.asarray(y, np.float64)), axis=-1))


def test_mamba2_gates_before_its_norm():
    module, x = build(Mamba2Config(head_dim=16, state_dim=4)), hidden()
    y = module.finish(read(0, 2, 16), project(module, x), x)
    np.testing.assert_allclose(root_mean_square(y.reshape(LENGTH, -1)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet"])
def test_heads_are_gated_after_their_norm(name):
    module, x = build(MINE[name]), hidden()
    o = read(0, module.num_heads, module.head_dims[1])
    gate = jax.nn.silu(module.gate(x).reshape(o.shape))
    np.testing.assert_allclose(root_mean_square(module.finish(o, None, x) / gate), 1.0, rtol=1e-3)


def test_output_gate_of_kda_is_a_sigmoid_of_low_rank_with_a_bias():
    module, x, o = build(MINE["kda"]), hidden(), read(0, 2, 8)
    set_to(module.gate.up.bias, 1.5)
    gate = jax.nn.sigmoid(x @ kernel(module.gate.down) @ kernel(module.gate.up) + 1.5).reshape(o.shape)
    assert_close(module.finish(o, None, x), module.norm(o) * gate)


@pytest.mark.parametrize("name", ["hgrn2", "lightning", "lightnet"])
def test_norm_is_over_all_heads_together(name):
    """A head that reads little stays small beside the others."""
    module, x = build(MINE[name]), hidden()
    o = read(0, module.num_heads, module.head_dims[1]) * jnp.asarray([1.0, 1e-3])[None, None, :, None]
    y = module.finish(o, None, x)
    ratio = root_mean_square(y[0, :, 1]) / root_mean_square(y[0, :, 0])
    assert np.median(ratio) < 0.01


def test_unit_norm_has_its_epsilon_under_the_root():
    """Short vectors keep their shortness, and a vector of zeros has a gradient."""
    np.testing.assert_allclose(np.asarray(l2_normalize(jnp.asarray([1e-3, 0.0]))), [np.sqrt(0.5), 0], rtol=1e-6)
    gradient = jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros(3))
    np.testing.assert_allclose(np.asarray(gradient), 1e3, rtol=1e-6)


@pytest.mark.parametrize("name", DELTA)
def test_queries_are_scaled_after_their_norm(name):
    """The first token of a document reads K^-1/2 of what it writes under its own key."""
    module = build(dataclasses.replace(MINE[name], conv_size=None))
    module.q.kernel[...] = module.k.kernel[:, : module.q.kernel.shape[1]]
    inputs = project(module, 100 * hidden())  # so that norms are 1 and not a little less
    o = attend(module, inputs)
    if name == "gated_deltaproduct":
        inputs = inputs._replace(q=inputs.k[..., -1, :])  # the last key of the token
        o = attend(module, inputs._replace(beta=inputs.beta.at[..., 0].set(0.0)))
        inputs = inputs._replace(v=inputs.v.reshape(*o.shape[:3], 2, -1)[..., 1, :], beta=inputs.beta[..., 1])
    assert_close(o[0, 0], (8**-0.5 * inputs.beta[..., None] * inputs.v)[0, 0])


def test_no_rate_is_drawn_as_zero():
    """Its logarithm would be -inf, and its decay would learn nothing."""
    drawn = build(GatedDeltaNetConfig(num_heads=4096, head_dim=1, expand_v=1.0)).A_log[...]
    assert np.isfinite(drawn).all()
    assert float(jnp.exp(drawn).min()) >= 0.0099
    assert float(jnp.exp(drawn).max()) < 16.0
    assert np.isneginf(log_uniform_rate(0.0, 1e-45)(jax.random.key(0), (4,), jnp.float32)).any()


@pytest.mark.parametrize("name", MINE)
def test_rates_steps_bounds_and_norms_have_no_weight_decay(name):
    params = nnx.to_flat_state(nnx.state(build(MINE[name]), nnx.Param))
    roles = {".".join(map(str, path)): p.get_metadata()["role"] for path, p in params}
    free = ("A_log", "dt_bias", "D", "norm.scale", "lower_bound.bias", "theta", "log_decay", "bias")
    free = [n for n in roles if n.endswith(free)]
    assert free
    assert not [n for n in free if roles[n] in PRODUCTS]
    assert all(roles[n] in PRODUCTS for n in roles if n.endswith("kernel"))


@pytest.mark.parametrize("name", [*DELTA, "mamba2"])
def test_convolutions_begin_anew_with_each_document(name):
    module, x = build(MINE[name]), hidden()
    packed = project(module, x, at=layout((9, 12), length=LENGTH))
    alone = project(module, x[:, 9:], at=layout((12,), length=12))
    for got, expected in zip(packed[:3], alone[:3], strict=True):
        assert_close(got[:, 9:], expected)


@pytest.mark.parametrize("name", DELTA)
def test_negative_eigenvalues_double_the_write(name):
    module = build(dataclasses.replace(MINE[name], negative_eigenvalues=True))
    set_to(module.b.kernel, 0.0)
    np.testing.assert_array_equal(np.asarray(module.write_strength(hidden())), 1.0)
    plain = build(dataclasses.replace(MINE[name], negative_eigenvalues=False))
    set_to(plain.b.kernel, 0.0)
    np.testing.assert_array_equal(np.asarray(plain.write_strength(hidden())), 0.5)


@pytest.mark.parametrize("name", MINE)
def test_no_decay_is_above_one_and_extremes_have_gradients(name):
    """Inputs a thousand times too large: log decays stay at most 0, outputs and gradients finite."""
    graph, params, rest = nnx.split(build(MINE[name]), nnx.Param, ...)

    @quick_jit
    def run(params, x):
        module = nnx.merge(graph, params, rest)
        y, pull = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x, at=AT, carry={}).y, params, x)
        return module.project(x, at=AT, state=None)[0].g, y, pull(jnp.ones_like(y))

    for size in (1e3, -1e3, 0.0):
        g, *found = run(params, size * hidden())
        assert g is None or float(g.max()) <= 0.0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_bounded_decay_of_kda_stays_within_its_bound():
    module = build(MINE["kda-bounded"])
    g = project(module, 1e3 * hidden()).g
    assert float(g.min()) >= -5.0
    np.testing.assert_array_equal(np.asarray(module.A_log[...]), 0.0)
    assert (module.A_log.shape, module.dt_bias.shape) == ((2,), (16,))  # a head, and a channel


def test_hgrn2_writes_what_it_forgets():
    inputs = project(build(MINE["hgrn2"]), hidden())
    assert_close(inputs.k, 1 - jnp.exp(inputs.g))


def test_lower_bound_is_a_sum_of_logarithms():
    """A gate that is shut far beyond float32's smallest number still has its logarithm, and a gradient."""
    ctx = dataclasses.replace(CTX, layer_index=0)
    first = LowerBound(ctx, 2)
    y = jnp.full((1, 1, 2), -300.0)
    np.testing.assert_allclose(np.asarray(first(y)), -300.0)
    np.testing.assert_allclose(np.asarray(jax.grad(lambda y: first(y).sum())(y)), 1.0)


def test_lower_bound_holds_gates_up():
    bound = LowerBound(CTX, 2)
    np.testing.assert_allclose(np.exp(np.asarray(bound(jnp.full((1, 1, 2), -1e4)))), 0.25, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(bound(jnp.full((1, 1, 2), 1e4))), 0.0, atol=1e-7)


def test_lightning_has_no_scale_and_slopes_that_are_not_trained():
    module = build(MINE["lightning"])
    assert module.scale == 1.0
    assert isinstance(module.slopes, Buffer)
    plain = build(LightningConfig(head_dim=8))
    inputs = project(plain, hidden())
    o = attend(plain, inputs)
    assert_close(o[0, 0], ((inputs.q * inputs.k).sum(-1, keepdims=True) * inputs.v)[0, 0])


def test_lightnet_decodes_with_its_sums():
    """A step that forgot the sum so far would write its own key with full weight."""
    module, x = build(LightNetConfig(head_dim=8, gate_rank=4)), hidden()
    before, now = layout((LENGTH - 1,), length=LENGTH - 1), Tokens(positions=jnp.full((1, 1), LENGTH - 1))

    def decode(module, x):
        _, _, state = module.prefill(x[:, :-1], module.init_state(1, LENGTH), at=before, carry={})
        return module.step(x[:, -1:], state, at=now, carry={})

    y, _, last = jitted(decode, module, x)
    assert_close(y, forward(module, x)[:, -1:])
    assert_close(last.z, jax.nn.logsumexp(module.heads(module.k(x)), axis=1))


def test_lightnet_sums_in_float32():
    """512 equal keys in bfloat16: a sum in bfloat16 stops growing at 256."""
    at = layout((512,), length=512)

    def sums(module, x):
        return module.project(x, at=at, state=module.init_state(1, 512))[1].z

    ctx = dataclasses.replace(CTX, compute_dtype=jnp.bfloat16)
    module = LightNetConfig(num_heads=2, head_dim=8, gate_rank=4).build(WIDTH, ctx)
    set_to(module.k.kernel, 0.0)
    np.testing.assert_allclose(np.asarray(jitted(sums, module, jnp.ones((1, 512, WIDTH)))), np.log(512), rtol=1e-5)


def test_every_option_of_the_delta_family_is_read():
    bare = build(GatedDeltaNetConfig(num_heads=2, head_dim=8, conv_size=None, gate=False))
    assert bare.gate is None
    assert not bare.init_state(1, 4).convs
    no_decay = build(GatedDeltaProductConfig(num_heads=2, head_dim=8, decay=False))
    assert project(no_decay, hidden()).g is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: HGRN2Config(head_dim=12).fit(WIDTH), "head_dim=12 must divide d_model=16"),
        (lambda: KDAConfig(lower_bound=0.5), "lower_bound=0.5 must be"),
        (lambda: GatedDeltaProductConfig(num_householder=0), "num_householder=0 must be"),
        (lambda: LightningConfig(gate=None, gate_rank=4), "gate_rank=4 needs a gate"),
        (lambda: LightNetConfig(num_heads=3, head_dim=8, tpe=True).fit(WIDTH), "tpe=True needs heads that divide"),
    ],
)
def test_options_outside_a_paper_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()

"""Recurrent layers worked by hand in float64, what they become in special cases, and their initial decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import decay, delta_rule
from plait.kernels.shapes import l2_normalize
from plait.models.mixers.linear.deltanet import DeltaNetConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gated_deltaproduct import GatedDeltaProductConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lightnet import LightNetConfig, share_of_sum
from plait.models.mixers.linear.lightning import LightningConfig, slopes
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.linear.retnet import RetNetConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.mixers.linear.layers import (
    AT,
    LENGTH,
    WIDTH,
    attend,
    build,
    decayed,
    delta,
    forward,
    hidden,
    in_float64,
    jitted,
    kernel,
    project,
    rms_norm,
    set_to,
    silu,
)
from plait.tests.tolerances import assert_close


@pytest.mark.proves("gla")
def test_gla_layer_by_hand():
    module, x = build(GLAConfig(num_heads=2, gate_rank=3)), hidden()
    set_to(module.decay_up.bias, 0.5)
    (row,) = in_float64(x)
    q, k, v, gate = (row @ kernel(dense) for dense in (module.q, module.k, module.v, module.gate))
    g = -np.log1p(np.exp(-(row @ kernel(module.decay_down) @ kernel(module.decay_up) + 0.5))) / 16
    heads = lambda y: y.reshape(LENGTH, 2, -1)
    o = rms_norm(decayed(heads(q), heads(k), heads(v), heads(g), 4**-0.5), module.norm.scale, 1e-5)
    expected = (o * silu(heads(gate))).reshape(LENGTH, -1) @ kernel(module.o)
    assert_close(forward(module, x)[0], expected)


@pytest.mark.proves("retnet")
def test_retnet_layer_by_hand():
    module, x = build(RetNetConfig(num_heads=2)), hidden()
    (row,) = in_float64(x)
    heads = lambda y: y.reshape(LENGTH, 2, -1)
    q, k, v, gate = (heads(row @ kernel(dense)) for dense in (module.q, module.k, module.v, module.gate))
    angle = np.arange(LENGTH)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turn = lambda y: np.concatenate(
        [y[..., :4] * np.cos(angle) - y[..., 4:] * np.sin(angle), y[..., 4:] * np.cos(angle) + y[..., :4] * np.sin(angle)], -1
    )
    kept = np.array([1 - 2.0**-5, 1 - 2.0**-6])
    lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    weights = np.einsum("thk,shk->hts", turn(q), turn(k)) * 8**-0.5 * np.where(lag >= 0, kept[:, None, None] ** lag, 0)
    o = rms_norm(np.einsum("hts,shv->thv", weights, v), module.norm.scale, 1e-5)
    assert_close(forward(module, x)[0], (o * silu(gate)).reshape(LENGTH, -1) @ kernel(module.o))


@pytest.mark.parametrize("convention", ["released", "paper"])
def test_transnormer_form_of_lightning_by_hand(convention):
    """With the whole T x T matrix of weights, positions in it: cos(theta (t - s)) in every channel."""
    config = LightningConfig(
        num_heads=2, head_dim=8, slopes=convention, norm="simple", gate="linear", silu_values=False, lrpe=True
    )
    module, x = build(config), hidden()
    (row,) = in_float64(x)
    heads = lambda y: y.reshape(LENGTH, 2, -1)
    q, k, v, gate = (heads(row @ kernel(dense)) for dense in (module.q, module.k, module.v, module.gate))
    fall = {"released": [2.0**-4, 2.0**-8], "paper": [4.0, 8.0]}[convention]
    fall = np.array(fall) * {"released": 1 - 1 / (3 + 1e-5) + 1e-5, "paper": 1 - 1 / 4}[convention]
    lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    theta = 10_000.0 ** (-np.arange(16) / 8).reshape(2, 8)
    turned = np.cos(theta[:, None, None] * lag[None, :, :, None])
    weights = np.einsum("thk,shk,htsk->hts", silu(q), silu(k), turned)
    weights = weights * np.where(lag >= 0, np.exp(-fall[:, None, None] * np.maximum(lag, 0)), 0)
    o = np.einsum("hts,shv->thv", weights, v).reshape(LENGTH, -1)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * gate.reshape(LENGTH, -1)
    assert_close(forward(module, x)[0], o @ kernel(module.o))


def test_lightning_slopes():
    """First head of eight in the first layer: 1/2 or 1; hardly any decay in the last, and none of it trained."""
    released = np.asarray([slopes("released", 8, layer, 24) for layer in (0, 12, 23)])
    np.testing.assert_allclose(released[0], 2.0 ** -np.arange(1.0, 9), rtol=2e-5)
    np.testing.assert_allclose(np.asarray(slopes("paper", 8, 0, 24)), np.arange(1.0, 9))
    assert (released[0] > released[1]).all()
    assert (released[2] < 2e-5).all()


@pytest.mark.parametrize("lrpe", [False, True])
def test_lightnet_is_a_softmax_over_time_in_every_channel(lrpe):
    """Without and with relative positions, which weigh a channel by cos(theta (t - s))."""
    module, x = build(LightNetConfig(head_dim=8, gate_rank=4, lrpe=lrpe)), 3 * hidden()
    inputs = project(module, x)
    q, k = jitted(lambda m, x: (jax.nn.silu(m.heads(m.q(x))), m.heads(m.k(x))), module, x)
    q, k, v = in_float64(q, k, inputs.v)
    seen = np.tri(LENGTH, dtype=bool)[:, :, None, None]
    share = np.where(seen, np.exp(k - k.max(0))[None], 0)
    share = share / share.sum(1, keepdims=True)  # [T, S, H, K]
    if lrpe:
        lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        share = share * np.cos(lag[:, :, None, None] * np.asarray(module.lrpe.theta[...], np.float64))
    expected = 8**-0.5 * np.einsum("thk,tshk,shv->thv", q, share, v)
    assert_close(attend(module, inputs)[0], expected)


def test_lightnet_shares_of_three_tokens():
    """Keys log 1, log 2, log 1: shares 1, 2/3, 1/4; each sum keeps 1/3 and 3/4 of the one before."""
    k = jnp.log(jnp.asarray([1.0, 2.0, 1.0])).reshape(1, 3, 1, 1)
    share, g, z = quick_jit(lambda k: share_of_sum(k, at=layout((3,), length=3), start=None))(k)
    np.testing.assert_allclose(np.asarray(share).ravel(), [1, 2 / 3, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(np.exp(np.asarray(g).ravel()), [1, 1 / 3, 3 / 4], rtol=1e-6)
    np.testing.assert_allclose(float(z[0, 0, 0]), np.log(4), rtol=1e-6)


def test_tpe_is_a_normalised_fading_mean():
    module, x = build(LightNetConfig(head_dim=8, gate_rank=4, tpe=True)).tpe, hidden()
    (row,) = in_float64(x)
    keep = 1 / (1 + np.exp(-np.asarray(module.log_decay[...], np.float64)))
    c = (np.asarray(module.q[...], np.float64) * np.asarray(module.k[...], np.float64)).sum(-1)
    mean, means = np.zeros((2, 8)), []
    for token in row.reshape(LENGTH, 2, 8):
        mean = keep[:, None] * mean + token
        means.append(c[:, None] * mean)
    expected = rms_norm(np.stack(means), module.norm.scale, 1e-5).reshape(LENGTH, -1) @ kernel(module.o)
    assert_close(jitted(lambda module, x: module(x, at=AT, state=None)[0], module, x)[0], expected)


def unit(inputs):
    """The inputs of a delta rule with queries and keys as it normalises them."""
    return inputs._replace(q=l2_normalize(inputs.q), k=l2_normalize(inputs.k))


@pytest.mark.parametrize(
    "config", [KDAConfig(num_heads=2, head_dim=8), GatedDeltaNetConfig(num_heads=2, head_dim=8)], ids=["kda", "gdn"]
)
def test_state_decays_before_it_is_erased(config):
    """What the new value is compared with is what the decayed state predicts."""
    module = build(config)
    set_to(module.dt_bias, 0.0)  # decays of about exp(-A / 2) a token
    inputs = project(module, hidden())
    o = attend(module, inputs)
    assert_close(o[0], delta(*in_float64(*unit(inputs)), 8**-0.5))


def test_deltaproduct_decays_once_a_token_and_is_read_after_its_last_step():
    module = build(GatedDeltaProductConfig(num_heads=2, head_dim=4, expand_v=1.0, num_householder=3))
    set_to(module.dt_bias, 0.0)
    inputs = project(module, hidden())
    o = attend(module, inputs)
    q, k, v, g, beta = in_float64(*unit(inputs))
    expected, v = np.zeros((LENGTH, 2, 4)), v.reshape(LENGTH, 2, 3, 4)
    for h in range(2):
        state = np.zeros((4, 4))
        for t in range(LENGTH):
            state = np.exp(g[t, h]) * state
            for i in range(3):
                state = state + beta[t, h, i] * np.outer(k[t, h, i], v[t, h, i] - state.T @ k[t, h, i])
            expected[t, h] = state.T @ q[t, h] / 2
    assert_close(o[0], expected)


def test_kda_of_equal_channels_is_gated_deltanet():
    kda, gdn = build(KDAConfig(num_heads=2, head_dim=8)), build(GatedDeltaNetConfig(num_heads=2, head_dim=8, expand_v=1.0))
    inputs = project(gdn, hidden())
    wide = inputs._replace(g=jnp.broadcast_to(inputs.g[..., None], inputs.k.shape))
    assert_close(attend(kda, wide), attend(gdn, inputs))


def test_gated_deltanet_without_decay_is_deltanet():
    gdn, plain = build(GatedDeltaNetConfig(num_heads=2, head_dim=8, expand_v=1.0)), build(DeltaNetConfig(num_heads=2, head_dim=8))
    inputs = project(gdn, hidden())
    kept = attend(gdn, inputs._replace(g=jnp.zeros_like(inputs.g)))
    assert_close(attend(plain, inputs._replace(g=None)), kept)


def test_one_step_of_deltaproduct_is_gated_deltanet():
    options = {"num_heads": 2, "head_dim": 8, "negative_eigenvalues": True}
    gdn, product = build(GatedDeltaNetConfig(**options)), build(GatedDeltaProductConfig(**options, num_householder=1))
    assert_close(forward(product, hidden()), forward(gdn, hidden()))


def test_kda_that_writes_nothing_keeps_an_empty_state():
    module = build(KDAConfig(num_heads=2, head_dim=8))
    inputs = project(module, hidden())
    memory = jitted(lambda m, i: m.attend(i, at=AT, state=m.init_state(1, LENGTH))[1].memory, module, inputs)
    assert np.asarray(memory).any()
    nothing = inputs._replace(beta=jnp.zeros_like(inputs.beta))
    memory = jitted(lambda m, i: m.attend(i, at=AT, state=m.init_state(1, LENGTH))[1].memory, module, nothing)
    assert not np.asarray(memory).any()


def test_gla_of_one_decay_a_head_is_the_core_of_retnet_and_mamba2():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, LENGTH, 2, 8))
    g = -jax.random.uniform(jax.random.key(1), (1, LENGTH, 2))
    both = quick_jit(lambda q, k, v, g: (decay(q, k, v, jnp.broadcast_to(g[..., None], q.shape))[0], decay(q, k, v, g)[0]))
    assert_close(*both(q, k, v, g))


def test_delta_rule_stores_values_under_orthonormal_keys_exactly():
    """Three tokens under the unit vectors with full strength, and each is read again by its key."""
    k, v = jnp.eye(3)[None, :, None], jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[None, :, None]
    o, state = quick_jit(lambda k, v: delta_rule(k, k, v, None, jnp.ones((1, 3, 1)), scale=1.0))(k, v)
    np.testing.assert_array_equal(np.asarray(o), np.asarray(v))
    np.testing.assert_array_equal(np.asarray(state[0, 0]), np.asarray(v[0, :, 0]))


def half_lives(g: jax.Array) -> np.ndarray:
    """Tokens until half is forgotten, of log decays."""
    return np.log(0.5) / np.asarray(g, np.float64)


def test_initial_half_lives():
    x = jnp.zeros((1, LENGTH, WIDTH))  # gates before they are trained to anything
    retnet = half_lives(project(build(RetNetConfig(num_heads=2)), x).g)[0, 0]
    np.testing.assert_allclose(retnet, [21.83, 44.01], rtol=1e-3)
    np.testing.assert_allclose(half_lives(project(build(GLAConfig(num_heads=2)), x).g), 16.0, rtol=1e-5)
    lightning = build(LightningConfig(num_heads=8, head_dim=2), layer_index=0, num_layers=24)
    np.testing.assert_allclose(np.asarray(project(lightning, x).g)[0, 0, 0], -0.5, rtol=2e-5)
    one, first = jnp.zeros((1, 1, 256)), layout((1,), length=1)
    many = Mamba2Config(head_dim=4), GatedDeltaNetConfig(num_heads=128, head_dim=2)
    mamba, gdn = (half_lives(project(build(config, width=256), one, at=first).g) for config in many)
    assert mamba.min() >= np.log(2) / (0.1 * 16)
    assert mamba.max() <= np.log(2) / 1e-3
    assert 5 < np.median(mamba) < 15  # the steps' geometric mean 0.01 times the rates' median 8.5
    assert gdn.min() >= np.log(2) / (0.1 * 16)
    assert 5 < np.median(gdn) < 16


def test_hgrn2_bounds_rise_with_depth_from_zero():
    bounds = [jax.nn.sigmoid(build(HGRN2Config(head_dim=8), layer_index=i, num_layers=6).lower_bound.logit()) for i in range(6)]
    np.testing.assert_allclose(np.asarray(bounds), np.broadcast_to(np.arange(6)[:, None] / 6, (6, WIDTH)), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(bounds[0]), 0.0)

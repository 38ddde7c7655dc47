"""What is particular to layers that scan: where it is easily got wrong, and how they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.hgrn import HGRNConfig
from plait.models.mixers.linear.mamba1 import Mamba1Config
from plait.models.mixers.linear.mega import MegaConfig
from plait.models.mixers.linear.rg_lru import RGLRUConfig
from plait.models.mixers.linear.rwkv7 import FASTEST, RWKV7Config
from plait.tests.models.common import build, layout, quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, DOCUMENTS = 64, 20, (12, 7)
AT = layout(DOCUMENTS, length=LENGTH)


def mixer(config: MixerConfig, **surroundings):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, **{"num_layers": 4} | surroundings))


def hidden(scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))


def test_the_first_layer_has_no_lower_bound_and_later_ones_forget_less():
    gates = []
    for layer in range(4):
        hgrn = mixer(HGRNConfig(), layer_index=layer)
        g = np.asarray(hgrn.project(hidden(), at=AT, state=None)[0].g[:, :, 0])
        gates.append(np.exp(g).min())
        if layer == 0:
            assert_close(g, jax.nn.log_sigmoid(hgrn.f(hidden())))
        assert np.exp(g).min() >= layer / 4
    assert gates == sorted(gates)


def test_the_first_token_of_a_document_is_written_whole():
    """As Griffin's code has it: elsewhere the input is scaled by sqrt(1 - a^2)."""
    lru = mixer(RGLRUConfig.example())
    inputs, _ = lru.project(hidden(), at=AT, state=None)
    u, _ = lru.conv(lru.x(hidden()), at=AT)
    u = lru.heads(u)
    blocks = jnp.einsum("bthk,hkj->bthj", u, lru.input_gate.weight()) + lru.input_gate.bias[...][None, None]
    whole = np.asarray(jax.nn.sigmoid(blocks) * u)
    scale = np.sqrt(-np.expm1(2 * np.asarray(inputs.g)))
    first = np.asarray(AT.positions)[0] == 0
    real = np.asarray(AT.segment_ids)[0] > 0
    assert_close(inputs.v[:, first & real], whole[:, first & real])
    assert_close(inputs.v[:, ~first], (whole * scale)[:, ~first])


def test_gates_of_a_block_see_that_block_alone():
    lru = mixer(RGLRUConfig.example())
    u = jax.random.normal(jax.random.key(0), (1, 1, 4, 16))
    reached = jax.jacrev(lambda u: jnp.einsum("bthk,hkj->bthj", u, lru.decay_gate.weight()))(u)
    assert np.count_nonzero(np.abs(np.asarray(reached)).max((3, 7)).reshape(4, 4)) == 4


def test_a_decay_of_one_has_a_finite_gradient():
    """Where nothing is forgotten, sqrt(1 - a^2) has no slope."""
    lru = mixer(RGLRUConfig.example())
    lru.rate[...] = jnp.full_like(lru.rate[...], -200.0)  # softplus is 0 in float32
    gradient = jax.grad(lambda x: jnp.sum(lru(x, at=AT, carry={}).y))(hidden())
    assert np.isfinite(gradient).all()
    assert (np.asarray(lru.project(hidden(), at=AT, state=None)[0].g) == 0).all()


def test_decays_start_as_griffins():
    rate = np.asarray(mixer(RGLRUConfig(expand=16.0)).rate[...], np.float64)
    a = 1 / (1 + np.exp(rate))  # exp(-softplus)
    assert (a > 0.9 - 1e-6).all() and (a < 0.999 + 1e-6).all()
    assert abs((a**2).mean() - (0.9**2 + 0.999**2) / 2) < 0.01


def test_states_start_real_and_steps_log_uniform():
    """S4D-real: the n-th number of every channel decays at rate n; steps between 1e-3 and 0.1."""
    mamba = mixer(Mamba1Config(state_dim=5))
    assert_close(mamba.A, -np.broadcast_to(np.arange(1.0, 6)[:, None], (5, 128)), dtype="float32")
    step = np.asarray(jax.nn.softplus(mamba.dt_bias[...]))
    assert (step > 0.99e-3).all() and (step < 0.101).all()
    assert (np.asarray(mamba.D[...]) == 1).all()


def test_rwkv_starts_as_the_authors_code():
    """Their loops over channels, in the third of four layers."""
    layer, layers, head = 2, 4, 16
    rwkv = mixer(RWKV7Config.example(), layer_index=layer, num_layers=layers)
    depth, left = layer / (layers - 1), 1 - layer / layers
    mixes = np.zeros((6, WIDTH))
    decay, rate, value, removed = np.zeros((4, WIDTH))
    for n in range(WIDTH):
        linear = n / (WIDTH - 1) - 0.5
        zigzag = (n % head - (head - 1) / 2) / ((head - 1) / 2)
        zigzag *= abs(zigzag)
        for i, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
            mixes[i, n] = 1 - (n / WIDTH) ** (power * left)
        decay[n] = -6 + 6 * (n / (WIDTH - 1)) ** (1 + depth**0.3) + 0.5 + zigzag * 2.5
        rate[n] = -0.19 + zigzag * 0.3 + linear * 0.4
        value[n], removed[n] = 0.73 - linear * 0.4, 0.71 - linear * 0.1
    pairs = {"mixes": mixes, "w.bias": decay, "a.bias": rate, "to_first.bias": value, "removed": removed}
    params = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(rwkv, nnx.Param))}
    for name, expected in pairs.items():
        assert_close(params[name], expected, dtype="float32", err_msg=name)
    assert_close(params["group_norm.scale"], np.full(WIDTH, (3 / 4) ** 0.7), dtype="float32")
    assert not any(np.asarray(params[name]).any() for name in ("o.kernel", "w.down.kernel", "g.down.kernel", "group_norm.bias"))
    up = np.asarray(params["w.up.kernel"], np.float64)
    assert_close(up @ up.T, 0.01 * np.eye(8), dtype="float32")
    assert np.abs(params["k.kernel"]).max() <= 0.05 / 8 < 0.4 / 8 < np.abs(params["r.kernel"]).max() <= 0.5 / 8
    assert rwkv.group_norm.eps == 64e-5


def test_rwkv_forgets_no_more_than_its_bound():
    rwkv = mixer(RWKV7Config.example())
    rwkv.w.bias[...] = jnp.linspace(-100.0, 100.0, WIDTH)
    g = np.asarray(rwkv.project(hidden(), at=AT, state=None)[0].g)
    assert (g >= -np.float32(FASTEST)).all() and (g <= 0).all() and g.min() < -0.6


def test_what_rwkv_removes_has_unit_norm_in_each_head_whatever_the_keys_size():
    inputs, _ = mixer(RWKV7Config.example()).project(hidden(1e-3), at=AT, state=None)
    real = np.asarray(AT.segment_ids)[0] > 0
    norms = np.linalg.norm(np.asarray(inputs.a), axis=-1)[:, real]
    assert_close(norms, np.ones_like(norms))
    empty, _ = mixer(RWKV7Config.example()).project(jnp.zeros_like(hidden()), at=AT, state=None)
    assert np.isfinite(empty.a).all()


def test_shifted_tokens_stay_in_their_document():
    rwkv = mixer(RWKV7Config.example())
    before, last = rwkv.shift(hidden(), at=AT)
    expected = np.array(np.roll(hidden(), 1, axis=1))
    expected[:, [0, DOCUMENTS[0], LENGTH - 1]] = 0  # where documents begin, and padding
    np.testing.assert_array_equal(before, expected)
    np.testing.assert_array_equal(last[:, 0], hidden()[:, sum(DOCUMENTS) - 1])


@pytest.mark.parametrize("pattern", usually(["rwkv7", "softmax,rwkv7"], "softmax,rwkv7"))
def test_later_layers_take_the_values_of_the_first_that_has_them(pattern: str):
    """The weights that move values to the first layer's have gradients in all layers but that one."""
    known = {"rwkv7": RWKV7Config(head_dim=16), "softmax": SoftmaxConfig(num_heads=2, head_dim=8)}
    mixers = {name: known[name] for name in pattern.split(",")}
    config = LMConfig(d_model=32, num_layers=4, pattern=pattern, mixers=mixers, vocab_size=16)
    model = build(config, seq_len=LENGTH)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    at = AT.__class__(jnp.arange(LENGTH)[None] % 16, AT.segment_ids, AT.positions)
    loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(at)[0]))
    found = nnx.to_flat_state(quick_jit(jax.grad(loss))(params))
    gradients = [np.asarray(leaf[...]) for path, leaf in found if path[-2:] == ("to_first", "bias")]
    used = np.concatenate([np.abs(g).max(-1, keepdims=True) if g.ndim == 1 else np.abs(g).max(-1) for g in gradients]) > 0
    assert sorted(used) == [False] + [True] * (len(used) - 1)
    assert not used[0]


@pytest.mark.parametrize("config", [HGRNConfig, Mamba1Config, MegaConfig])
def test_a_width_of_nothing_is_refused(config: type):
    with pytest.raises(ValueError, match=r"expand=0.01 must leave at least one of d_model=64 channels; use 0.015625 or more"):
        config(expand=0.01).fit(WIDTH)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"head_dim=24 must divide expand \* d_model=64; use one of 1, 2, 4, 8, 16, 32, 64"):
        RGLRUConfig(head_dim=24).fit(WIDTH)
    with pytest.raises(ValueError, match=r"head_dim=24 must divide d_model=64"):
        RWKV7Config(head_dim=24).fit(WIDTH)

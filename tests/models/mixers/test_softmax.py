"""Every option of softmax attention, against the formula in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.full.softmax import Softmax, SoftmaxConfig
from plait.models.mixers.sparse.power import PowerConfig
from plait.models.positions.rotary import RotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, HEADS, HEAD_DIM = 32, 14, 4, 8
AT = layout((LENGTH,), (8, 5), length=LENGTH)
OPTIONS = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "nope": {"positions": None},
    "theta": {"positions": RotaryConfig(theta=50.0)},
    "qk_norm": {"qk_norm": True},
    "window": {"window_size": 3},
    "window-sinks": {"window_size": 3, "num_sink_tokens": 2},
    "sink_logits": {"sink_logits": True},
    "elementwise-gate": {"gate": "elementwise"},
    "headwise-gate": {"gate": "headwise"},
    "sigmoid": {"normalizer": "sigmoid"},
    "biases-scale-log_n": {"qkv_bias": True, "o_bias": True, "scale": 0.2, "log_n_scale": 3},
    "width-norm": {"qk_norm": True, "qk_norm_over": "width", "num_kv_heads": 2},
    "key-window": {"sink_bias": "k", "window_size": 3, "num_kv_heads": 2},
    "key_value-window": {"sink_bias": "kv", "window_size": 3, "num_kv_heads": 2},
    "key-logit": {"sink_bias": "k", "sink_logits": True},
    "value": {"sink_bias": "v"},
    "value_scale": {"value_scale": True, "num_kv_heads": 2},
    "power": {"block_size": 2},
    "power-window-sinks": {"block_size": 2, "window_size": 3, "num_sink_tokens": 1},
}


def build(config: SoftmaxConfig) -> Softmax:
    """The layer, every parameter moved off its initial value."""
    ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=LENGTH)
    layer = config.build(WIDTH, ctx)
    for i, variable in enumerate(jax.tree.leaves(nnx.state(layer), is_leaf=lambda v: isinstance(v, nnx.Variable))):
        variable[...] = np.asarray(variable[...]) + np.float32(0.3) * np.asarray(
            jax.random.normal(jax.random.key(i), variable.shape)
        )
    return layer


def formula(layer: Softmax, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[B, H, T, S]` and output `[B, T, D]`, in float64, one document at a time."""
    config = layer.config
    w = lambda dense: np.asarray(dense.kernel[...], np.float64)
    project = lambda h, dense: h @ w(dense) + (0 if dense.bias is None else np.asarray(dense.bias[...], np.float64))
    learned = lambda name: np.repeat(np.asarray(getattr(layer, name)[...], np.float64), HEADS // config.heads(WIDTH)[1], axis=0)
    heads = lambda y: y.reshape(len(y), -1, HEAD_DIM)
    ids = np.asarray(AT.segment_ids)
    a, y = np.zeros((len(x), HEADS, LENGTH, LENGTH)), np.zeros_like(x)
    for row, document in [(r, d) for r in range(len(x)) for d in set(ids[r]) - {0}]:
        at = np.flatnonzero(ids[row] == document)
        h, n = x[row, at], len(at)
        q, k, v = (heads(project(h, dense)) for dense in (layer.q, layer.k, layer.v))
        if config.qk_norm:
            norm = lambda z, m: z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(m.scale[...])
            as_one = (lambda z: z.reshape(len(z), -1)) if config.qk_norm_over == "width" else lambda z: z
            q, k = (norm(as_one(z), m).reshape(z.shape) for z, m in ((q, layer.q_norm), (k, layer.k_norm)))
        if config.positions is not None:
            angle = np.arange(n)[:, None] * config.positions.theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
            turn = np.exp(1j * angle)[:, None]  # channel d and d + K/2 as a complex number
            q, k = ((z[..., : HEAD_DIM // 2] + 1j * z[..., HEAD_DIM // 2 :]) * turn for z in (q, k))
            q, k = (np.concatenate([z.real, z.imag], axis=-1) for z in (q, k))
        if config.log_n_scale is not None:
            q = q * np.maximum(np.log(np.arange(n) + 1) / np.log(config.log_n_scale), 1)[:, None, None]
        if config.value_scale:
            size = (v**2).sum(-1, keepdims=True)
            v = v * size / (size + HEAD_DIM * np.exp(np.asarray(layer.value_scale[...], np.float64))[:, None])
        k, v = (np.repeat(z, HEADS // z.shape[1], axis=1) for z in (k, v))
        scale = config.scale or HEAD_DIM**-0.5
        logits = np.einsum("ihd,jhd->hij", q, k) * scale
        i, j = np.arange(n)[:, None], np.arange(n)[None]
        seen = j <= i
        if isinstance(config, PowerConfig):
            back = i // config.block_size - j // config.block_size
            near = np.isin(back, [0, 1, 2, 4, 8]) | (j < config.num_sink_tokens)
            seen &= near if config.window_size is None else near | (i - j < config.window_size)
        elif config.window_size is not None:
            seen &= (i - j < config.window_size) | (j < config.num_sink_tokens)
        if config.normalizer == "sigmoid":
            weights = seen / (1 + np.exp(-(logits - np.log(LENGTH))))
        else:
            weights = np.exp(logits) * seen
            sinks = np.exp(np.asarray(layer.sinks[...]))[:, None, None] if config.sink_logits else 0.0
            extra = np.exp(np.einsum("ihd,hd->hi", q, learned("k_bias")) * scale)[..., None] if layer.k_bias is not None else 0.0
            total = weights.sum(-1, keepdims=True) + sinks + extra
            weights, extra = weights / total, extra / total
        o = np.einsum("hij,jhd->ihd", weights, v)
        if config.sink_bias == "kv":
            o = o + np.moveaxis(extra, 0, 1) * learned("v_bias")
        elif config.sink_bias == "v":
            o = o + learned("v_bias")
        if config.gate is not None:
            o = o / (1 + np.exp(-(h @ w(layer.gate)).reshape(n, HEADS, -1)))
        a[row][:, at[:, None], at] = weights
        y[row, at] = project(o.reshape(n, -1), layer.o)
    return a, y


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_equals_the_formula(options):
    config = PowerConfig if "block_size" in options else SoftmaxConfig
    layer = build(config(num_heads=HEADS, head_dim=HEAD_DIM, **options))
    x = jax.random.normal(jax.random.key(9), (2, LENGTH, WIDTH))
    a, expected = formula(layer, np.asarray(x, np.float64))
    real = np.asarray(AT.segment_ids > 0)
    y, implied = quick_jit(lambda x: (layer(x, at=AT, carry={}).y, layer.implied_attention(x, at=AT)))(x)
    assert_close(np.asarray(y)[real], expected[real])
    assert_close(implied, a)
    np.testing.assert_array_equal(np.asarray(implied) > 0, a > 0)


def test_what_a_layer_tells_leaves_its_sink_logits_out_however_large_they_are():
    layer = build(SoftmaxConfig(num_heads=HEADS, head_dim=HEAD_DIM, sink_logits=True))
    x = jax.random.normal(jax.random.key(9), (2, LENGTH, WIDTH))

    graph, state = nnx.split(layer)

    @quick_jit
    def told(sinks: jax.Array) -> list[jax.Array]:
        layer = nnx.merge(graph, jax.tree.map(lambda a: a, state))
        layer.sinks[...] = sinks
        inputs, _ = layer.project(x, at=AT, state=None)
        seen = layer.observe(inputs, x, at=AT)
        return [*seen["attention"], seen["first_masses"](first_k=2), seen["column_mass"]()]

    alone = told(np.full(HEADS, -1e4, np.float32))
    for got, want in zip(told(np.float32([0, 20, 60, 300])), alone, strict=True):
        assert_close(got, want)

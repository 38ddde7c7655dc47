"""What the tests of linear mixers share: a small layer, its inputs, and recurrences as float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.tests.models.common import layout, quick_jit

WIDTH, LENGTH = 16, 21
AT = layout((LENGTH,), length=LENGTH)


def build(config: MixerConfig, *, layer_index: int = 1, num_layers: int = 4, width: int = WIDTH, seed: int = 0):
    """The module of a config, in the second of four layers unless said otherwise."""

    def create():
        ctx = BuildContext(layer_index=layer_index, num_layers=num_layers, rngs=nnx.Rngs(seed), seq_len=LENGTH)
        return config.build(width, ctx)

    return nnx.merge(nnx.split(nnx.eval_shape(create))[0], quick_jit(lambda: nnx.split(create())[1])())


def hidden(seed: int = 1, length: int = LENGTH, width: int = WIDTH) -> jax.Array:
    """An input `[1, length, width]`."""
    return jax.random.normal(jax.random.key(seed), (1, length, width))


def in_float64(*arrays: jax.Array) -> list[np.ndarray]:
    """The first row of each array."""
    return [np.asarray(a, np.float64)[0] for a in arrays]


def project(module, x: jax.Array, at=AT):
    """The inputs of the layer's recurrence."""
    return jitted(lambda module, x: module.project(x, at=at, state=None)[0], module, x)


def attend(module, inputs) -> jax.Array:
    """What the heads read, `[1, T, H, V]`."""
    return jitted(lambda module, inputs: module.attend(inputs, at=AT, state=None)[0], module, inputs)


def forward(module, x: jax.Array) -> jax.Array:
    """The layer's output."""
    return jitted(lambda module, x: module(x, at=AT, carry={}).y, module, x)


def jitted(function, module, *args):
    """`function(module, *args)` in one program."""
    graph, state = nnx.split(module)
    return quick_jit(lambda state, *args: function(nnx.merge(graph, state), *args))(state, *args)


def kernel(dense) -> np.ndarray:
    """The matrix of a projection, `[in, out]` float64."""
    return np.asarray(dense.kernel[...], np.float64)


def rms_norm(x: np.ndarray, scale, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(scale[...], np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def decayed(q, k, v, g, scale: float) -> np.ndarray:
    """`S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = scale S_t^T q_t` of `[T, H, ...]`, g `[T, H]` or `[T, H, K]`."""
    o = np.zeros_like(v)
    for h in range(v.shape[1]):
        state = np.zeros((k.shape[2], v.shape[2]))
        for t in range(len(v)):
            state = np.exp(g[t, h])[..., None] * state + np.outer(k[t, h], v[t, h])
            o[t, h] = scale * state.T @ q[t, h]
    return o


def delta(q, k, v, g, beta, scale: float) -> np.ndarray:
    """The delta rule of `[T, H, ...]`: decay, then erase, then write; g None for no decay."""
    o = np.zeros_like(v)
    for h in range(v.shape[1]):
        state = np.zeros((k.shape[2], v.shape[2]))
        for t in range(len(v)):
            state = state if g is None else np.exp(g[t, h])[..., None] * state
            state = state + beta[t, h] * np.outer(k[t, h], v[t, h] - state.T @ k[t, h])
            o[t, h] = scale * state.T @ q[t, h]
    return o


def set_to(parameter, value) -> None:
    """Gives a parameter this value everywhere."""
    parameter[...] = jnp.broadcast_to(jnp.asarray(value, parameter.dtype), parameter.shape)

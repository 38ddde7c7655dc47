"""What the tests of softmax attention's variants share: layers moved off their initial values, and their formulas head by head in NumPy."""

import jax
import numpy as np
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.tests.models.common import layout

WIDTH, LENGTH = 32, 11
AT = layout((LENGTH,), (6, 4), length=LENGTH)
REAL = np.asarray(AT.segment_ids > 0)
X = jax.random.normal(jax.random.key(5), (2, LENGTH, WIDTH))


def build(config: MixerConfig, layer: int = 0, causal: bool = True, moved: bool = True):
    """The layer, its parameters moved off their initial values."""
    ctx = BuildContext(layer_index=layer, num_layers=4, rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal)
    mixer = config.build(WIDTH, ctx)
    leaves = jax.tree.leaves(nnx.state(mixer, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    for i, parameter in enumerate(leaves if moved else ()):
        parameter[...] = parameter[...] + 0.2 * jax.random.normal(jax.random.key(i), parameter.shape)
    return mixer


def run(mixer) -> np.ndarray:
    return np.asarray(mixer(X, at=AT, carry={}).y)[REAL]


def matrix(dense) -> np.ndarray:
    return np.asarray(dense.kernel[...], np.float64)


def heads(x: np.ndarray, dense, number: int) -> np.ndarray:
    """`[number, T, K]`."""
    return np.moveaxis((x @ matrix(dense)).reshape(len(x), number, -1), 1, 0)


def causal_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Causal softmax `[T, T]` of one head's queries and keys."""
    z = q @ k.T / np.sqrt(q.shape[1])
    a = np.exp(z - z.max(-1, keepdims=True)) * np.tri(len(q))
    return a / a.sum(-1, keepdims=True)


def by_document(mixer, formula) -> np.ndarray:
    """What `formula` makes of the heads `[H, T, K]` of each document, projected back."""
    y = np.zeros((2, LENGTH, WIDTH))
    ids = np.asarray(AT.segment_ids)
    for row, document in ((r, d) for r in range(2) for d in set(ids[r]) - {0}):
        where = np.flatnonzero(ids[row] == document)
        o = formula(np.asarray(X, np.float64)[row, where])
        y[row, where] = np.moveaxis(o, 0, 1).reshape(len(where), -1) @ matrix(mixer.o)
    return y[REAL]

"""What the model tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.kernels import Tokens
from plait.models.config import LMConfig
from plait.models.lm import LM

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` that compiles in half the time and runs slower: right for models this small."""


def layout(*rows: tuple[int, ...], length: int) -> Tokens:
    """Tokens `[B, length]`, without ids, of rows made of documents of these lengths and then padding."""
    segment_ids, positions = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, size in enumerate(documents):
            segment_ids[row, start : start + size] = index + 1
            positions[row, start : start + size] = np.arange(size)
            start += size
    return Tokens(None, jnp.asarray(segment_ids), jnp.asarray(positions))


def left_padded(*lengths: int) -> tuple[Tokens, np.ndarray]:
    """Tokens of prompts of these lengths, padded left to the longest; and the index in its prompt of each (0 at padding).

    Positions at padding are the last one: a value that does harm where it is read.
    """
    longest = max(lengths)
    index = np.arange(longest)[None] - (longest - np.asarray(lengths)[:, None])
    segment_ids, positions = index >= 0, np.where(index >= 0, index, longest - 1)
    return Tokens(None, *(jnp.asarray(a, jnp.int32) for a in (segment_ids, positions))), np.maximum(index, 0)


def build(config: LMConfig, *, seq_len: int, seed: int = 0) -> LM:
    """The model, its parameters made in one compiled function."""
    create = lambda: LM(config, rngs=nnx.Rngs(seed), seq_len=seq_len)
    graph, _ = nnx.split(nnx.eval_shape(create))
    return nnx.merge(graph, quick_jit(lambda: nnx.split(create())[1])())

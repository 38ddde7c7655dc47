"""What the model tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.models.config import LMConfig
from plait.models.lm import LM

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""`jax.jit` that compiles in half the time and runs slower: right for models this small."""


def layout(*rows: tuple[int, ...], length: int) -> dict[str, jax.Array]:
    """Segment ids and positions `[B, length]` of rows made of documents of these lengths and then padding."""
    segment_ids, positions = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, size in enumerate(documents):
            segment_ids[row, start : start + size] = index + 1
            positions[row, start : start + size] = np.arange(size)
            start += size
    return {"segment_ids": jnp.asarray(segment_ids), "positions": jnp.asarray(positions)}


def left_padded(*lengths: int) -> tuple[dict[str, jax.Array], np.ndarray]:
    """Segment ids and positions of prompts of these lengths, padded left to the longest; and each slot's token (0 at padding).

    Positions at padding are the last one: a value that does harm where it is read.
    """
    longest = max(lengths)
    index = np.arange(longest)[None] - (longest - np.asarray(lengths)[:, None])
    where = {"segment_ids": index >= 0, "positions": np.where(index >= 0, index, longest - 1)}
    return {name: jnp.asarray(a, jnp.int32) for name, a in where.items()}, np.maximum(index, 0)


def build(config: LMConfig, *, seq_len: int, seed: int = 0) -> LM:
    """The model, its parameters made in one compiled function."""
    create = lambda: config.build(rngs=nnx.Rngs(seed), seq_len=seq_len)  # noqa: E731
    graph, _ = nnx.split(nnx.eval_shape(create))
    return nnx.merge(graph, quick_jit(lambda: nnx.split(create())[1])())

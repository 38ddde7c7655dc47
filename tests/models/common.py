"""What the model tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.kernels import Tokens
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.tests.tolerances import assert_close

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


def assert_decodes_as_the_call(model: LM, ids: jax.Array, prompts: tuple[int, ...] = (4, 9), new: int = 8) -> None:
    """Logits of left-padded prompts, the beginnings of the rows of `ids`, and of each token after them are those of the whole rows."""
    graph, params = nnx.split(model)
    at, index = left_padded(*prompts)
    prompt = jnp.take_along_axis(ids, jnp.asarray(index), axis=1)
    prefill = quick_jit(lambda p, *args: nnx.merge(graph, p).prefill(*args))
    step = quick_jit(lambda p, *args: nnx.merge(graph, p).step(*args))
    logits, state = prefill(params, dataclasses.replace(at, ids=prompt), model.init_state(len(prompts), max(prompts) + new))
    seen = [logits]
    for i in range(new):
        position = jnp.asarray(prompts)[:, None] + i
        logits, state = step(params, Tokens(jnp.take_along_axis(ids, position, axis=1), None, position), state)
        seen.append(logits)
    whole = layout(*[(n + new,) for n in prompts], length=ids.shape[1])
    full = quick_jit(lambda p, at: nnx.merge(graph, p)(at)[0])(params, dataclasses.replace(whole, ids=ids))
    for row, n in enumerate(prompts):
        assert_close(jnp.stack(seen)[:, row], full[row, n - 1 : n + new])

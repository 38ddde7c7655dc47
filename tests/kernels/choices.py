"""Calls of block selection in which the heads of a group choose together, as the suites of its kernels try them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Tokens, whole_blocks
from plait.kernels.topk_blocks.call import TopkCall
from plait.tests.kernels import cases


class Case(NamedTuple):
    """One call."""

    heads: tuple[int, int] = (4, 2)
    length: int = 300
    dim: int = 16
    dtype: str = "float32"
    segments: str | None = "several"
    scale: float | None = 0.4
    runs: tuple[int, int] | None = None
    """Stride and span."""
    weights: bool = False


def call_of(case: Case) -> tuple[Any, dict[str, jax.Array]]:
    """A function of arrays to a call, and the arrays."""
    rng, batch = np.random.default_rng(case.length), 1 if case.segments is None else cases.BATCH
    (num_heads, num_kv_heads), size = case.heads, 1 if case.weights else 8
    ids = jnp.ones((batch, case.length), jnp.int32) if case.segments is None else cases.segments(case.length, case.segments)
    at = Tokens(None, ids).placed(batch, case.length)
    blocks_at = at if case.weights else whole_blocks(at, *(case.runs or (size,))).at
    shapes = {"q": (case.length, num_heads, case.dim), "blocks": (blocks_at.positions.shape[1], num_kv_heads, case.dim)}
    arrays = {name: jnp.asarray(rng.standard_normal((batch, *shape)), case.dtype) for name, shape in shapes.items()}
    if case.weights:
        arrays["weights"] = jnp.asarray(rng.standard_normal((batch, case.length, num_heads)), case.dtype)
    stride, span = case.runs or (None, None)
    fields = {"top_k": 4, "block_size": size, "num_local": 0 if case.weights else 1, "num_first": 0, "by_group": True}
    fields |= {"scale": case.scale, "num_blocks": -(-case.length // size), "stride": stride, "span": span}
    return lambda arrays: TopkCall(at=at, blocks_at=blocks_at, **arrays, **fields), arrays

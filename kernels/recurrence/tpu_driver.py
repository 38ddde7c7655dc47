"""The TPU (Mosaic) driver of the linear recurrences: two kernels for any `tpu_chunk.BlockFunction`.

Both walk the grid (batch, key heads, blocks of several chunks, value heads of the key head), where a step may take several heads of
either kind; the last two run in order and carry the states of a key head's value heads in VMEM. Heads of a step do not wait for each
other, and the value heads of a key head share its loads and, without a decay a channel, its scores. The forward kernel writes
outputs, the final state and, for the gradient, the state that enters each backward block. The backward kernel walks the blocks in
reverse, recomputes a block and differentiates the very same function inside the kernel, so that values and gradients share one piece
of math; gradients of q and k are summed over the value heads in VMEM. Heads whose width is a multiple of 128 are read from
[B, T, H K] in place, others head-major.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.recurrence import RecurrenceCall, Results, in_value_parts, summarize, tpu_kernels, value_parts
from plait.kernels.recurrence.tpu_chunk import BlockFunction
from plait.kernels.recurrence.tpu_grid import LANES, MIN_TOKENS, Operands, Problem, Tiles, heads_a_step
from plait.kernels.target import current, not_on

Array = jax.Array

MAX_DIM = 256

MAX_STATES = 16 * 128 * 128
"""Numbers in the states of one key head's value heads, which stay in VMEM."""


SEVERAL_HEADS = {
    4: Tiles(forward_chunks=2, backward_chunks=2, forward_heads=4, backward_heads=2),
    2: Tiles(forward_chunks=4, backward_chunks=2, forward_heads=2, backward_heads=2),
}
"""By heads a step, the delta rule's tiles in bfloat16 without a decay a channel, up to 128 channels.

Eight chunks of all heads together, or four backwards, are what fits VMEM.
"""

CORES = {"v4": 2, "v5p": 2}
"""Generations whose device is two cores, which divide heads and rows among them."""


def choose_tiles(
    generation: str,
    key_dim: int,
    value_dim: int,
    full: bool,
    by_channel: bool,
    delta: bool = False,
    batch: int = 1,
    heads: tuple[int, int] = (1, 1),
) -> Tiles:
    """Tiles that compile within the scoped VMEM of a generation (v5e and v5p: 16 MiB); `heads` are the key and the value heads.

    `full` means float32 products: there a larger chunk would show in the accuracy of its triangular inverse. `delta` is the delta
    rule, one head of which waits for its chain of products; the other recurrences gain nothing from several heads a step.
    """
    wide = max(key_dim, value_dim) > LANES
    if full:
        return Tiles(chunk_size=64, forward_chunks=2, backward_chunks=1 if wide else 2)
    fitting = [n for n in SEVERAL_HEADS if delta and _divides(n, batch, *heads, CORES.get(generation, 1))]
    if wide:
        limit = 2 if fitting and not by_channel else 1
        return Tiles(forward_chunks=2, backward_chunks=1, forward_heads=limit, backward_heads=limit)
    if by_channel:
        return Tiles(forward_chunks=2 if fitting else 4, backward_chunks=2, forward_heads=2 if fitting else 1)
    return SEVERAL_HEADS[fitting[0]] if fitting else Tiles()


def _divides(number: int, batch: int, num_qk_heads: int, num_heads: int, cores: int) -> bool:
    """Whether steps can take that many heads, and the steps of different heads and rows all cores."""
    keys, members = heads_a_step(num_qk_heads, num_heads, number)
    return keys * members == number and batch * num_qk_heads // keys % cores == 0


def unsupported(call: RecurrenceCall) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, k, v = call.q, call.k, call.v
    if reason := not_on("tpu"):
        return reason
    dtypes = {x.dtype.name for x in (k, v)}
    if len(dtypes) > 1 or not dtypes | {q.dtype.name} <= {"float32", "bfloat16"}:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; k and v must be alike, all float32 or bfloat16"
    parts = value_parts(v.shape[-1])
    if k.shape[-1] > MAX_DIM or v.shape[-1] % parts:
        return f"head dims {k.shape[-1]} and {v.shape[-1]} are not up to {MAX_DIM} and a multiple of {parts}"
    if parts > 1 and call.return_stats:
        return f"values of {v.shape[-1]} channels are worked off in {parts} parts, whose statistics do not add up"
    if (numbers := v.shape[2] // k.shape[2] * k.shape[-1] * v.shape[-1]) > MAX_STATES:
        return f"the states of a key head's value heads hold {numbers} numbers, more than {MAX_STATES}"
    if q.shape[1] < MIN_TOKENS:
        return f"{q.shape[1]} tokens are fewer than {MIN_TOKENS}"
    return None


def recurrence(block: BlockFunction, call: RecurrenceCall) -> Results:
    """See `plait.kernels.decay` and `plait.kernels.delta_rule`, whose chunks `block` computes."""
    q, k, v, segment_ids = call.q, call.k, call.v, call.segment_ids
    gates = (call.g,) if call.beta is None else (call.g, call.beta)
    if (parts := value_parts(v.shape[3])) > 1:
        return in_value_parts(partial(recurrence, block), call, parts)
    (batch, length, _, key_dim), (num_heads, value_dim) = k.shape, v.shape[2:]
    here = current()
    full = k.dtype == jnp.float32
    by_channel = any(g is not None and g.ndim == 4 for g in gates)
    generation = "v5e" if here is None else here.generation
    counts = batch, (k.shape[2], num_heads)
    tiles = choose_tiles(generation, key_dim, value_dim, full, by_channel, call.beta is not None, *counts).fit(length)
    padding = -length % (tiles.chunk_size * tiles.forward_chunks)
    pad = lambda x, **how: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), **how) if padding else x
    tokens = None
    if segment_ids is not None:
        number, real = chunking.segment_index(segment_ids)
        number = pad(number, mode="edge").astype(jnp.float32)
        last = number.reshape(batch, -1, tiles.chunk_size)[:, :, -1]
        entering = jnp.repeat(jnp.pad(last[:, :-1], ((0, 0), (1, 0))), tiles.chunk_size, axis=1)
        tokens = jnp.stack([number, entering, pad(real.astype(jnp.float32))], axis=1)
    state = jnp.zeros((batch, num_heads, value_dim, key_dim), jnp.float32)
    if call.initial_state is not None:
        state = jnp.swapaxes(call.initial_state.astype(jnp.float32), 2, 3)
    wide = tuple(None if g is None else pad(g.astype(jnp.float32)) for g in gates)
    problem = Problem(block, tiles, call.scale, full, call.return_stats, call.l2_norm_eps)
    o, final, sums = _run(problem, Operands(pad(q), pad(k), pad(v), wide, state, tokens))
    stats = None
    if sums is not None:
        squares, writes, rates = jnp.moveaxis(jax.lax.stop_gradient(sums), (3, 1), (0, 3))  # [B, N, Hv] each
        stats = summarize(jnp.sqrt(squares), writes, rates, tiles.chunk_size, call)
    return o[:, :length], jnp.swapaxes(final, 2, 3), stats


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(problem: Problem, x: Operands) -> tuple[Array, Array, Array | None]:
    """o, the final state [B, Hv, V, K] and the sums [B, Hv, N, 3] of the statistics."""
    o, final, sums, _ = tpu_kernels.forward(problem, x, keep=False)
    return o, final, sums


def _run_forward(problem: Problem, x: Operands) -> Any:
    o, final, sums, entering = tpu_kernels.forward(problem, x, keep=True)
    return (o, final, sums), (x, entering)


def _run_backward(problem: Problem, saved: tuple[Operands, Array], cotangents: tuple[Array, ...]) -> tuple[Operands]:
    x, entering = saved
    return (tpu_kernels.backward(problem, x, entering, *cotangents[:2]),)


_run.defvjp(_run_forward, _run_backward)

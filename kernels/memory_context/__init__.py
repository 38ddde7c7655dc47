"""Attention within segments to what a memory gives as their context, and a memory that learns from that attention (Titans, MAC)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.kernels.dispatch import Implementation, Op
from plait.kernels.memory_context import chunked, reference
from plait.kernels.memory_context.call import ContextCall, ContextState, Layers, Learned
from plait.kernels.online_memory.rule import Rule, Weights
from plait.kernels.shapes import check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens

__all__ = ["ContextState", "Layers", "Learned", "empty_context", "memory_context"]

Array = jax.Array

_op = Op(
    "memory_context",
    chunked=Implementation(chunked.memory_context, per_device=True),
    reference=Implementation(reference.memory_context),
)


def memory_context(
    reads: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    persistent_logits: Array,
    persistent_values: Array,
    layers: Layers,
    initial: Weights,
    rule: Rule,
    state: ContextState,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array, ContextState]:
    """What attention gives to each token, and what the memory does to that, segment after segment of `rule.chunk_size` tokens.

    With M_s the memory before segment s, whose token t is: h_t = M_s(reads_t); y_t = attention of q_t to the persistent tokens, to the
    keys and values of h_j and to those of the segment's own tokens j <= t; then M learns from y_t, as in `online_memory`, with
    gradients at M_s, and o_t = M_t(q(y_t)).

    Args:
      reads: [B, T, H, K], the memory's queries of the tokens.
      q: [B, T, H, K], queries of the attention, turned by their positions if it has any.
      k: [B, T, H, K].
      v: [B, T, H, K].
      persistent_logits: [B, T, H, P] of the P persistent tokens, scaled.
      persistent_values: [P, H, K].
      layers: the projections of what is only known inside; see `Layers`. D is H K.
      initial: what the memory of a document begins with; see `online_memory`.
      rule: the memory and how it learns; its chunk is the segment, counted from the start of the document.
      state: of the first token's document; `empty_context` before it.
      at: what is known of the tokens.
      implementation: "auto", "chunked" or "reference".

    Returns:
      y [B, T, D] and o [B, T, H, K] in q's dtype, and the state after the last token that is not padding.

    Raises:
      ValueError: a shape does not fit, or the implementation is unknown.

    Source: Titans, arXiv 2501.00663, section 4.1.
    """
    op = "memory_context"
    check_rank(op, "q", q, "[B, T, H, K]")
    for name, array in (("reads", reads), ("k", k), ("v", v)):
        check_shape(op, name, array, q.shape, "[B, T, H, K] as q")
    check_tokens(op, "at", at, *q.shape[:2])
    at = (at or Tokens()).placed(*q.shape[:2])
    dtype = jnp.result_type(jnp.float32, q)
    wide = lambda weights: tuple(w.astype(dtype) for w in weights)
    call = ContextCall(
        reads=reads,
        q=q,
        k=k,
        v=v,
        persistent_logits=persistent_logits,
        persistent_values=persistent_values,
        layers=layers,
        initial=tuple(initial),
        segment_ids=at.segment_ids,
        positions=at.positions,
        accumulated=wide(state.accumulated),
        speed=wide(state.momentum),
        opened=wide(state.opened),
        slots=state.slots,
        filled=state.filled,
        convs=state.convs,
        chunk=state.chunk,
        rule=rule,
    )
    y, o, *after = _op(implementation, call)
    return y, o, ContextState(*after)


def empty_context(initial: Weights, batch: int, segment: int, dim: int, taps: int, dtype: jax.typing.DTypeLike) -> ContextState:
    """The state of `batch` sequences before their first token, with keys and values of `dim` channels kept in `dtype`."""
    zeros = tuple(jnp.zeros((batch, *w.shape), jnp.float32) for w in initial)
    heads = initial[0].shape[0]
    slots = (jnp.zeros((batch, segment, heads, dim), dtype),) * 4
    convs = (jnp.zeros((batch, taps - 1, heads * dim), dtype),) * 3
    filled, chunk = jnp.zeros((batch, segment), bool), jnp.full((batch,), -1, jnp.int32)
    return ContextState(zeros, zeros, zeros, slots, filled, convs, chunk)

"""Selection of key blocks for trained sparse attention (MoBA, NSA)."""

import jax

from plait.kernels.dispatch import Implementation, Op
from plait.kernels.masks import BlockTable
from plait.kernels.shapes import check_divides, check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks import chunked, reference
from plait.kernels.topk_blocks.call import TopkCall

__all__ = ["topk_blocks"]

Array = jax.Array

_op = Op(
    "topk_blocks",
    chunked=Implementation(chunked.topk_blocks),
    reference=Implementation(reference.topk_blocks),
)


def topk_blocks(
    q: Array,
    k: Array,
    *,
    top_k: int,
    block_kv: int = 64,
    block_q: int = 1,
    num_local: int = 1,
    num_first: int = 0,
    by_group: bool = False,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> BlockTable:
    """The `top_k` key blocks that each query, or each block of queries, gives the largest scores; a table for `attention`.

    s_in = q_i . mean_{j in block n} k_j over blocks that end before the query (its block of queries) begins; of those in its
    segment the largest are taken, after the `num_local` blocks up to its own and the `num_first` of its segment, which count.
    A block's mean is over the tokens of its last segment, the only one that later queries can share, so no document sees another.
    A block of queries chooses by its first query, since a mean would look ahead. Nothing here has a gradient, as in MoBA.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      k: [B, T, Hkv, K]; Hkv divides H.
      top_k: blocks a query sees, at least num_local + num_first.
      block_kv: keys a block.
      block_q: queries that choose together, 1 or more; must not exceed block_kv, which it divides.
      num_local: blocks up to and with the query's own, at least 1; causality inside them is the mask's part.
      num_first: leading blocks of the segment.
      by_group: the heads of one group of k choose together, by their summed scores (NSA).
      at: what is known of the tokens; padding chooses its own block only. None is one segment.
      implementation: "auto", "chunked" or "reference".

    Returns:
      `BlockTable` of bool [B, H, ceil(T / block_q), ceil(T / block_kv)], to be used with a causal mask.

    Raises:
      ValueError: a shape, count or known segment id does not fit, or the implementation is unknown.

    Source: MoBA, arXiv 2502.13189, equations 5 to 7; group scores, first and local blocks of NSA, 2502.11089.
    """
    op = "topk_blocks"
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "k", k, "[B, T, Hkv, K]")
    check_shape(op, "k", k, (*q.shape[:2], k.shape[2], q.shape[3]), "[B, T, Hkv, K] with B, T and K of q")
    check_divides(op, "the number of k heads", k.shape[2], "the number of q heads", q.shape[2])
    check_divides(op, "block_q", block_q, "block_kv", block_kv)
    check_tokens(op, "at", at, *q.shape[:2])
    if num_local < 1 or num_first < 0 or top_k < num_local + num_first:
        raise ValueError(
            f"{op}: top_k={top_k} must hold num_local={num_local} (at least 1) and num_first={num_first} (at least 0); "
            f"use at least {max(num_local, 1) + max(num_first, 0)}"
        )
    call = TopkCall(
        q=jax.lax.stop_gradient(q),
        k=jax.lax.stop_gradient(k),
        segment_ids=None if at is None else at.segment_ids,
        top_k=top_k,
        block_kv=block_kv,
        block_q=block_q,
        num_local=num_local,
        num_first=num_first,
        by_group=by_group,
    )
    return BlockTable(visible=_op(implementation, call), block_q=block_q, block_kv=block_kv)

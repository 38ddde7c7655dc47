"""Selection of key blocks, or tokens, for trained sparse attention (MoBA, NSA, DSA)."""

import jax

from plait.kernels.context.topk_blocks import CONTEXT
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.masks import SelectedBlocks
from plait.kernels.shapes import check_divides, check_floating, check_rank, check_shape, check_tokens
from plait.kernels.tokens import Tokens
from plait.kernels.topk_blocks import chunked, reference
from plait.kernels.topk_blocks.call import TogetherCall, TopkCall

__all__ = ["topk_blocks"]

Array = jax.Array

_op = Op(
    "topk_blocks",
    CONTEXT,
    pallas_tpu=kernel("tpu", "plait.kernels.topk_blocks.pallas_tpu", "topk_blocks"),
    pallas_gpu=kernel("gpu", "plait.kernels.topk_blocks.pallas_gpu", "topk_blocks"),
    chunked=Implementation(chunked.topk_blocks, per_device=True),  # its runs of queries are as long as one device has room for
    reference=Implementation(reference.topk_blocks),
)


def topk_blocks(
    q: Array,
    blocks: Array,
    *,
    blocks_at: Tokens,
    top_k: int,
    block_size: int,
    num_blocks: int,
    num_local: int = 1,
    num_first: int = 0,
    by_group: bool = False,
    scale: float | None = None,
    stride: int | None = None,
    span: int | None = None,
    weights: Array | None = None,
    at: Tokens | None = None,
    implementation: str = "auto",
) -> SelectedBlocks:
    """The `top_k` blocks of its document that each query gives the largest scores, for `attention`.

    s_in = q_i . c_n over the blocks n of the query's segment that come before its own; of those the largest are taken, after the
    `num_local` blocks up to its own and the `num_first` of its segment, which count. Of equal scores the later block is taken. Blocks are
    counted from the start of the segment, and a block that is past is whole, so no query sees ahead and no document sees another.
    Nothing here has a gradient.

    Args:
      q: [B, T, H, K], float32 or bfloat16.
      blocks: c, [B, N, Hkv, K]: what stands for each block's keys, such as `whole_blocks(...).mean(k)`; Hkv divides H.
      blocks_at: the segment of each block (0 where there is none) and, as `positions`, its number in it, int32 [B, N].
      top_k: blocks a query sees, at least num_local + num_first.
      block_size: tokens a block.
      num_blocks: blocks that the longest segment may have.
      num_local: blocks up to and with the query's own, at least 1; causality inside them is the mask's part. With a block_size of 1 it may
        be 0: the query's own token has a score like others.
      num_first: leading blocks of the segment.
      by_group: the heads of one group of blocks choose together, by the sum of their scores (NSA).
      scale: scores are softmax_n(scale q_i . c_n) of each head, as the sums of NSA; None for the products themselves.
      stride: what is scored in place of the blocks are runs of `span` tokens that begin every `stride`, numbered in their segment; a
        block's score is the sum of those of the runs over it, as often as they have strides in it. It divides span and block_size.
        None is blocks themselves.
      span: tokens of such a run; a query has scores for the runs whose last token it sees.
      weights: [B, T, H] floating: scores are weights_ih relu(q_ih . c_n), as those of DSA's lightning indexer, and the heads of a group choose
        together; `by_group` and no `scale`.
      at: what is known of the queries; padding selects nothing. None is one segment.
      implementation: "auto", "pallas_tpu", "pallas_gpu", "chunked" or "reference".

    Returns:
      `SelectedBlocks` of int32 [B, T, H, min(top_k, N + 1)], or of Hkv heads with `by_group`, to be used with a causal mask; with
      `stride` num_blocks stands for N.

    Raises:
      ValueError: a shape, count or known segment id does not fit, or the implementation is unknown.

    Source: MoBA, arXiv 2502.13189, equations 5 to 7; NSA, 2502.11089, equations 8 to 10, first and local blocks; DSA, 2512.02556, equation 1.
    """
    op = "topk_blocks"
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "blocks", blocks, "[B, N, Hkv, K]")
    check_floating(op, q=q, blocks=blocks)
    check_shape(op, "blocks", blocks, (q.shape[0], *blocks.shape[1:3], q.shape[3]), "[B, N, Hkv, K] with B and K of q")
    check_divides(op, "the number of block heads", blocks.shape[2], "the number of q heads", q.shape[2])
    check_tokens(op, "at", at, *q.shape[:2])
    for name in ("segment_ids", "positions"):
        check_shape(op, f"blocks_at.{name}", getattr(blocks_at, name), blocks.shape[:2], "[B, N] of blocks")
    for name, value in (("block_size", block_size), ("num_blocks", num_blocks)):
        if value < 1:
            raise ValueError(f"{op}: {name}={value} must be at least 1; use 64 tokens, and as many as the longest segment has")
    least = 0 if block_size == 1 else 1
    if num_local < least or num_first < 0 or top_k < max(num_local + num_first, 1):
        raise ValueError(
            f"{op}: top_k={top_k} must hold num_local={num_local} (at least {least}) and num_first={num_first} (at least 0); "
            f"use at least {max(num_local, 1) + max(num_first, 0)}"
        )
    if (stride is None) != (span is None):
        raise ValueError(f"{op}: stride={stride} and span={span} are of one thing; give both, or None for both")
    if stride is not None and span is not None and (stride < 1 or span < stride or span % stride or block_size % stride):
        raise ValueError(
            f"{op}: stride={stride} must be at least 1 and divide span={span} and block_size={block_size}; use 16 for 32 and 64"
        )
    if weights is not None:
        check_shape(op, "weights", weights, q.shape[:3], "[B, T, H] of q")
        check_floating(op, weights=weights)
        if not by_group or scale is not None:
            raise ValueError(
                f"{op}: by_group={by_group} and scale={scale} with weights, which are of heads that choose together and leave nothing to a "
                "softmax; use by_group=True and scale=None"
            )
    q, blocks, weights = jax.lax.stop_gradient((q, blocks, weights))
    places = (at or Tokens()).placed(*q.shape[:2])
    together = by_group and blocks.shape[2] == 1
    call = (TogetherCall if together else TopkCall)(
        q=q,
        blocks=blocks,
        at=Tokens(segment_ids=places.segment_ids, positions=places.positions),
        blocks_at=Tokens(segment_ids=blocks_at.segment_ids, positions=blocks_at.positions),
        top_k=top_k,
        block_size=block_size,
        num_local=num_local,
        num_first=num_first,
        by_group=by_group,
        scale=scale,
        num_blocks=num_blocks,
        stride=stride,
        span=span,
        weights=weights,
    )
    return SelectedBlocks(indices=_op(implementation, call), block_size=block_size, num_blocks=num_blocks)

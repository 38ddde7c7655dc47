"""Attention on parts of sequences: every device fetches the keys that its queries can reach.

Where a window ends within reach, those are the tokens just before the part, sent by their neighbours. Else all devices gather all keys
and values (LASP-2H, arXiv 2502.07563, section 3.3), and causal queries are swapped between the two ends, so that all have equal work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.context import ContextRule, Parts
from plait.kernels.masks import BlockTable, Mask
from plait.kernels.tokens import Tokens

Array = jax.Array


def _unsupported(
    count: int,
    *args: Array,
    kv_segment_ids: Array | None = None,
    kv_positions: Array | None = None,
    block_table: BlockTable | None = None,
    **_: Any,
) -> str | None:
    if kv_segment_ids is not None or kv_positions is not None:
        return "the keys are not the queries' own tokens"
    return None if block_table is None else "it has a table of blocks"


def _run(
    op: Callable[..., Any],
    parts: Parts,
    q: Array,
    k: Array,
    v: Array,
    *active: Array,
    mask: Mask,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: None,
    kv_positions: None,
    **options: Any,
) -> Any:
    """`attention`, or `routed_attention` with its `active`."""
    op = partial(op, mask=mask, **options)
    batch, length = q.shape[:2]
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    if positions is None:
        positions = parts.own(Tokens(segment_ids=parts.gather(ids)).placed(batch, length * parts.count).positions)
    own = Tokens(segment_ids=ids, positions=positions)
    reach = near_reach(mask, length, parts.count)
    if reach is not None:
        near = lambda x: jnp.concatenate([parts.before(x, reach), x], axis=1)
        keys = jax.tree.map(near, own)
        return op(q, near(k), near(v), *active, **_tokens(own, keys))
    keys = jax.tree.map(parts.gather, own)
    turn: Any = parts.balanced if mask.causal else lambda x: x
    o = op(turn(q), parts.gather(k), parts.gather(v), *map(turn, active), **_tokens(jax.tree.map(turn, own), keys))
    return jax.tree.map(turn, o)


def near_reach(mask: Mask, length: int, count: int) -> int | None:
    """How many tokens before its part of `length` a device needs, where that is fewer than all; else None."""
    reach = mask.reach_back()
    if not mask.causal or mask.num_sink_tokens or reach is None or reach >= (count - 1) * length:
        return None
    return max(reach, 1)


def _tokens(queries: Tokens, keys: Tokens) -> dict[str, Array]:
    return {
        "segment_ids": queries.segment_ids,
        "positions": queries.positions,
        "kv_segment_ids": keys.segment_ids,
        "kv_positions": keys.positions,
    }


CONTEXT = ContextRule(_run, _unsupported)

"""Attention on parts of sequences: every device fetches the keys that its queries can reach.

Where a window ends within reach, those are the tokens just before the part, sent by their neighbours. Else all devices gather all keys
and values (LASP-2H, arXiv 2502.07563, section 3.3), and causal queries are swapped between the two ends, so that all have equal work.
Keys that are not the queries' own tokens, such as compressed ones, every device has already.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.context import ContextRule, Parts
from plait.kernels.masks import Mask
from plait.kernels.tokens import Tokens

Array = jax.Array


def _run(op: Callable[[AttentionCall], Any], parts: Parts, call: AttentionCall) -> Any:
    batch, length = call.q.shape[:2]
    own = call.at or Tokens()
    ids = jnp.ones((batch, length), jnp.int32) if own.segment_ids is None else own.segment_ids
    positions = own.positions
    if positions is None:
        positions = parts.own(Tokens(segment_ids=parts.gather(ids)).placed(batch, length * parts.count).positions)
    own = Tokens(segment_ids=ids, positions=positions)
    call = call.replace(at=own)
    reach = near_reach(call.mask, length, parts.count) if call.own_keys else None
    if reach is not None:
        near = lambda x: jnp.concatenate([parts.before(x, reach), x], axis=1)
        return op(call.replace(k=near(call.k), v=near(call.v), kv_at=jax.tree.map(near, own)))
    turn: Any = parts.balanced if call.mask.causal else lambda x: x
    if call.own_keys:
        call = call.replace(k=parts.gather(call.k), v=parts.gather(call.v), kv_at=jax.tree.map(parts.gather, own))
    return jax.tree.map(turn, op(call.on_queries(turn)))


def near_reach(mask: Mask, length: int, count: int) -> int | None:
    """How many tokens before its part of `length` a device needs, where that is fewer than all; else None."""
    reach = mask.reach_back()
    if not mask.causal or mask.num_sink_tokens or reach is None or reach >= (count - 1) * length:
        return None
    return max(reach, 1)


CONTEXT = ContextRule(_run)

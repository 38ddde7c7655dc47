"""Attention on parts of sequences: every device fetches the keys that its queries can reach.

Where a window ends within reach, those are the tokens just before the part, sent by their neighbours. Else all devices gather all keys
and values (LASP-2H, arXiv 2502.07563, section 3.3), and causal queries are swapped between the two ends, so that all have equal work,
which those that choose have where they are;
or, where that is chosen, keys and values go round in a `ring`, or, where the heads can be dealt out, each device gets whole sequences of
some heads (Ulysses, arXiv 2309.14509).
Keys that are not the queries' own tokens, such as compressed ones, every device has already.
"""

import dataclasses
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.context import ContextRule, Parts, ring
from plait.kernels.masks import Mask
from plait.kernels.tokens import Tokens

Array = jax.Array
_log = logging.getLogger("plait")


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
        return op(among(reach, call, k=near(call.k), v=near(call.v), kv_at=jax.tree.map(near, own)))
    if parts.exchange == "all_to_all" and call.own_keys:
        if _dealt(call, parts.count):
            return _by_heads(op, parts, call)
        heads, key_heads = call.q.shape[2], call.k.shape[2]
        _tell(f"{heads} heads with {key_heads} key heads cannot be dealt out to {parts.count} devices of the context axis")
    if parts.exchange == "ring" and call.own_keys:
        if (reason := ring.unsupported(call)) is None:
            return ring.attention(op, parts, call)
        _tell(reason)
    turn: Any = parts.balanced if call.mask.causal and not call.follows_choice else lambda x: x
    if call.own_keys:
        k = parts.gather(call.k)
        v = k[..., : call.v.shape[3]] if call.values_in_keys else parts.gather(call.v)
        call = among(parts.index * length, call, k=k, v=v, kv_at=jax.tree.map(parts.gather, own))
    return jax.tree.map(turn, op(call.on_queries(turn)))


def among(first: Any, call: AttentionCall, **keys: Any) -> AttentionCall:
    """The call with keys of which its own tokens are those from `first` on."""
    selected = call.selected
    if selected is not None:
        index = first + jnp.arange(call.q.shape[1], dtype=jnp.int32)
        selected = dataclasses.replace(selected, starts=index[None] - call.at.positions)
    return call.replace(**keys, selected=selected, kv_in_order=True)


@cache
def _tell(reason: str) -> None:
    _log.warning("attention: all keys are gathered: %s", reason)


def _dealt(call: AttentionCall, count: int) -> bool:
    """Whether devices can have as many heads each, with the key heads that those need, and choose for themselves."""
    heads, key_heads = call.q.shape[2], call.k.shape[2]
    choosing = 1 if call.selected is None else call.selected.indices.shape[2]
    return heads % count == 0 and (key_heads % count == 0 or count % key_heads == 0) and (choosing == 1 or choosing % count == 0)


def _by_heads(op: Callable[[AttentionCall], Any], parts: Parts, call: AttentionCall) -> Any:
    """`op` on whole sequences of the heads that are this device's; a key head that several devices need is sent to each."""
    times = max(1, parts.count // call.k.shape[2])

    def moved(axes: str, x: Array) -> Array:
        if axes == "h":
            return parts.own_heads(x)
        if "h" not in axes or x.shape[2] == 1 < call.q.shape[2]:
            return parts.gather(x)
        return parts.by_heads(x)

    own = {name: jax.tree.map(partial(moved, axes), value) for name, axes, value in call.arrays() if name not in ("k", "v")}
    keys = {
        name: jax.tree.map(lambda x: parts.by_heads(jnp.repeat(x, times, axis=2)), getattr(call, name)) for name in ("k", "v")
    }
    return jax.tree.map(parts.by_tokens, op(call.replace(**own, **keys)))


def near_reach(mask: Mask, length: int, count: int) -> int | None:
    """How many tokens before its part of `length` a device needs, where that is fewer than all; else None."""
    reach = mask.reach_back()
    if not mask.causal or mask.num_sink_tokens or reach is None or reach >= (count - 1) * length:
        return None
    return max(reach, 1)


CONTEXT = ContextRule(_run)

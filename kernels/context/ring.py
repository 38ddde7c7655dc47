"""Attention in a ring (arXiv 2310.01889): keys and values go round the devices, a part at a time, each sent on while it is attended to.

What the parts give is merged by their log-normalisers. Backward the keys go round again, and their gradients, in float32, with them;
kept for it are a device's own part, its outputs and their rows, so that no device ever holds two parts more than its own. Causal queries
and keys are swapped between the two ends first: then half of each pair of parts is visible, whichever two devices meet.

The gradient of a whole row is the sum of each part's `share`: over key j of part p, with w_p = exp(lse_p - lse),
  dz_j = A_j (do . v_j - do . o + dlse),    A_j = exp(z_j - lse) = w_p A^p_j,
which is that of w_p (o_p - o) and w_p. An op that is given o and lse makes it without a forward pass (`AttentionCall.whole`); with
statistics, and for the sigmoid, the part's forward pass is made again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall, RoutedCall
from plait.kernels.attention.per_query import with_sinks
from plait.kernels.attention.reference import MASKED, AttentionStats, lse_alone
from plait.kernels.attention.ties import longest_keys, ties, under_cap
from plait.kernels.attention.visits import layout_of
from plait.kernels.context import Parts
from plait.kernels.shapes import accumulation_dtype
from plait.kernels.tokens import Tokens

Array = jax.Array
Op = Callable[[AttentionCall], tuple[Array, Any]]
Whole = tuple[Array, Any]
"""o [B, T, H, V] and the rows of `AttentionStats`, those that nobody asked for None; of a sigmoid without statistics no rows."""

RING = "ring_of_parts"
MERGE = "merge_parts"
"""Names, in a program, what is sent beside the attention to a part, with that attention; and where parts are added up."""


class _Held(NamedTuple):
    """What goes round."""

    k: Array
    v: Array | None
    """None where the values are channels of the keys."""
    at: Tokens


def unsupported(call: AttentionCall) -> str | None:
    """Why a call cannot go round a ring, or None."""
    if isinstance(call, RoutedCall):
        return "routed heads tell no log-normaliser to merge parts by"
    return None if call.selected is None else "chosen keys are of the whole row"


def attention(op: Op, parts: Parts, call: AttentionCall) -> Whole:
    """`op` of queries of this part over the keys of all, which are the queries' own tokens; `call.at` is filled in."""
    sinks, dtype = call.sink_logits, call.q.dtype
    turn: Any = parts.balanced if call.mask.causal else lambda x: x
    turned = {name: jax.tree.map(turn, getattr(call, name)) for name in ("q", "k", "v", "at")}
    alone = call.replace(**turned, sinks=None, query_sinks=None, return_lse=not call.sigmoid)
    o, rows = _ring(op, parts, alone)
    o, rows = jax.tree.map(turn, (o.astype(dtype), rows))
    if sinks is not None:
        o, (lse, *rest) = with_sinks(o, [x for x in rows if x is not None], sinks)
        rows = AttentionStats(lse, *rest) if call.return_stats else lse_alone(lse)
    return o, rows if call.return_stats or call.return_lse else None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(op: Op, parts: Parts, call: AttentionCall) -> Whole:
    """Rows over the keys of all parts; the call's own first."""
    return _forward(op, parts, call)[0]


@jax.named_scope(RING)
def _forward(op: Op, parts: Parts, call: AttentionCall) -> tuple[Whole, Any]:
    def step(carry: tuple[_Held, Whole], _: Any) -> tuple[tuple[_Held, Whole], None]:
        held, total = carry
        return (jax.tree.map(parts.passed_on, held), _merged(call, total, op(_seeing(call, held)))), None

    held = _Held(call.k, None if call.values_in_keys else call.v, call.at)
    carry, _ = jax.lax.scan(step, (held, _nothing(call)), length=parts.count - 1)
    _, (o, rows) = step(carry, None)[0]  # nobody waits for what it sends on
    return (o, rows), (call, o.astype(call.q.dtype), rows)


@jax.named_scope(RING)
def _backward(op: Op, parts: Parts, saved: Any, cotangents: Whole) -> tuple[AttentionCall]:
    call, *whole = saved
    wide = partial(jax.tree.map, lambda x: x.astype(accumulation_dtype(x)))

    def gradients(held: _Held) -> tuple[Any, Any]:
        """Of what stays here, and of what goes round."""
        seeing = _seeing(call, held)
        own = {name: getattr(call, name) for name in ("q", "sigmoid_bias", "bias")}
        _, back = jax.vjp(lambda own, round_: _share(op, _with(seeing, own, round_), *whole), own, held[:2])
        return wide(back(cotangents))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        held, moving, sums = carry
        following, moving = jax.tree.map(parts.passed_on, (held, moving))  # its gradients catch up with the part held
        own, round_ = gradients(held)
        with jax.named_scope(MERGE):
            moving, sums = jax.tree.map(jnp.add, (moving, sums), (round_, own))
        return (following, moving, sums), None

    held = _Held(call.k, None if call.values_in_keys else call.v, call.at)
    sums, moving = gradients(held)
    carry = jax.tree.map(parts.passed_on, held), moving, sums
    if parts.count > 2:
        carry, _ = jax.lax.scan(step, carry, length=parts.count - 2)
    _, moving, sums = step(carry, None)[0]
    d_k, d_v = jax.tree.map(parts.passed_on, moving)
    d_v = jnp.zeros_like(call.v) if d_v is None else d_v  # with the keys'
    found = {**sums, "k": d_k, "v": d_v}
    like = {name: jax.tree.map(lambda d, x: d.astype(x.dtype), d, getattr(call, name)) for name, d in found.items()}
    return (call.replace(**like, at=None),)


_ring.defvjp(_forward, _backward)


def _seeing(call: AttentionCall, held: _Held) -> AttentionCall:
    return _with(call.replace(kv_at=held.at), {}, held[:2])


def _with(call: AttentionCall, own: dict[str, Any], round_: tuple[Array, Array | None]) -> AttentionCall:
    k, v = round_
    return call.replace(**own, k=k, v=k[..., : call.v.shape[3]] if v is None else v)


def _nothing(call: AttentionCall) -> Whole:
    """What no keys give."""
    dtype = accumulation_dtype(call.q, call.k, call.v)
    zero = jnp.zeros(call.q.shape[:3], dtype)
    o = jnp.zeros((*zero.shape, call.v.shape[3]), dtype)
    hidden = jnp.full_like(zero, MASKED)
    if call.return_stats:
        return o, AttentionStats(hidden, hidden, zero, zero)
    return o, lse_alone(hidden) if call.return_lse else None


@jax.named_scope(MERGE)
def _merged(call: AttentionCall, a: Whole, b: Whole) -> Whole:
    """What two sets of keys give together."""
    (o_a, x), (o_b, y) = a, b
    if x is None:
        return o_a + o_b, None
    lse = jnp.logaddexp(x.lse, y.lse)
    of_a, of_b = jnp.exp(x.lse - lse), jnp.exp(y.lse - lse)
    o = o_a + o_b if call.sigmoid else o_a * of_a[..., None] + o_b * of_b[..., None]
    if not call.return_stats:
        return o, lse_alone(lse)
    entropy = of_a * (x.entropy + lse - x.lse) + of_b * (y.entropy + lse - y.lse)
    first = of_a * x.first_mass + of_b * y.first_mass
    return o, AttentionStats(lse, jnp.maximum(x.max_logit, y.max_logit), entropy, first)


def _share(op: Op, call: AttentionCall, o: Array, rows: Any) -> Whole:
    """What has the gradients of the call's keys in o and rows, which are those of all."""
    known = rows is not None and not call.return_stats
    part_o, part = op(call.replace(whole=(o, rows.lse)) if known else call)
    part_o = part_o.astype(accumulation_dtype(call.q, call.k, call.v))
    if known or rows is None:
        return part_o, part
    weight = jnp.exp(part.lse - rows.lse)
    if not call.sigmoid:
        part_o = (part_o - o) * weight[..., None]
    near = ties(call.scale, call.q, longest_keys(layout_of(call), *call.sides, call.k))
    if call.bias is not None:
        near += jnp.finfo(near.dtype).eps * abs(rows.max_logit)
    near = under_cap(near, rows.max_logit, call.logit_soft_cap)
    largest = jnp.where(part.max_logit >= rows.max_logit - near, part.max_logit, 0)
    entropy = weight * (part.entropy - part.lse - (rows.entropy - rows.lse)) + weight
    return part_o, AttentionStats(weight, largest, entropy, weight * (part.first_mass - rows.first_mass))

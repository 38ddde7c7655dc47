"""Linear recurrences on parts of sequences: every device says what its part does to a state, and all of them learn it at once; or, in a
ring, each tells the next the state that leaves it.

A part maps the state S that enters it to A S + B. A and B need no other part, so one all-gather of them, whose size does not depend on
the length of the sequence, tells each device the state that enters its own (LASP-2, arXiv 2502.07563, for decays; the delta rule's A
is a matrix). In a ring a state goes through the parts one after the other, as many hops as there are borders, and no A is sent (LASP,
arXiv 2404.02882). A part that begins with a new segment takes nothing from the one before it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.context import ContextRule, Parts, ends
from plait.kernels.recurrence import RecurrenceCall, Results
from plait.kernels.shapes import accumulation_dtype, matmul_precision

Array = jax.Array
Op = Callable[[RecurrenceCall], Results]


class ChannelsCall(Protocol):
    """A call whose state decays by channel, each channel by itself."""

    initial_state: Array | None
    segment_ids: Array | None
    x: Array

    @property
    def log_decay(self) -> Array:
        """What a sequence of one segment does to the state that enters it, in the state's shape."""

    def replace(self, **fields: Any) -> Any:
        """The same call with other values of some fields."""


def _decay(op: Op, parts: Parts, call: RecurrenceCall) -> Results:
    """B is one product over the part's last segment, and the op then runs from the state that enters."""
    q, k, v = call.q, call.k, call.v
    dtype = accumulation_dtype(q, k, v)
    gates = call.gates[0].astype(dtype)  # [B, T, Hv, K or 1]
    ids = call.ids_of_all
    index, real = chunking.segment_index(ids)
    gates = jnp.where(real[..., None, None], gates, 0)
    later = jnp.flip(jnp.cumsum(jnp.flip(gates, 1), axis=1), 1) - gates
    weight = jnp.exp(later) * ((index == index[:, -1:]) & real)[..., None, None]
    k_out = jnp.repeat(k.astype(dtype), v.shape[2] // k.shape[2], axis=2) * weight
    write = jnp.einsum("bthk,bthv->bhkv", k_out, v.astype(dtype), precision=matmul_precision(q.dtype))
    decay = jnp.exp(gates.sum(1)) * (index[:, -1] == 0)[:, None, None]  # [B, Hv, K or 1]
    entering, final = _compose(parts, decay, write, ids, call.initial_state)
    o, _, stats = op(call.replace(initial_state=entering))
    return o, final, stats


def _delta_rule(op: Op, parts: Parts, call: RecurrenceCall) -> Results:
    """K columns beside the values, written with nothing and begun at the identity, show A at the end, and at each token the query
    that reads the entering state: o = o' + (P^T q)^T S, P being the product of the steps so far."""
    call = call.normalized()
    q, v, key_dim = call.q, call.v, call.k.shape[3]
    dtype = accumulation_dtype(q, call.k, v)
    batch, _, heads, value_dim = v.shape
    wide = jnp.concatenate([v, jnp.zeros((*v.shape[:3], key_dim), v.dtype)], axis=-1)
    start = jnp.concatenate([jnp.zeros((key_dim, value_dim), dtype), jnp.eye(key_dim, dtype=dtype)], axis=-1)
    start = jnp.broadcast_to(start, (batch, heads, *start.shape))
    o, state, _ = op(call.replace(v=wide, initial_state=start, return_stats=False))
    through, write = state[..., value_dim:], state[..., :value_dim]
    entering, final = _compose(parts, through, write, call.ids_of_all, call.initial_state)
    if call.return_stats:  # what a token writes depends on the state it finds
        o, _, stats = op(call.replace(initial_state=entering))
        return o, final, stats
    precision = matmul_precision(q.dtype)
    read = jnp.einsum("bthk,bhkv->bthv", o[..., value_dim:].astype(dtype), entering.astype(dtype), precision=precision)
    return (o[..., :value_dim].astype(dtype) + read).astype(q.dtype), final, None


def _channels(op: Callable[[Any], tuple[Array, Array]], parts: Parts, call: ChannelsCall) -> tuple[Array, Array]:
    """B is what the op leaves from a state of zeros; it then runs again from the state that enters."""
    ids = jnp.ones(call.x.shape[:2], jnp.int32) if call.segment_ids is None else call.segment_ids
    _, write = op(call.replace(initial_state=None))
    index, _ = chunking.segment_index(ids)
    column = lambda x: x.reshape(x.shape[0], 1, -1, 1)  # a head of as many keys as the state has numbers
    through = column(jnp.exp(call.log_decay))[..., 0] * (index[:, -1] == 0)[:, None, None]
    start = None if call.initial_state is None else column(call.initial_state)
    entering, final = _compose(parts, through, column(write), ids, start)
    y, _ = op(call.replace(initial_state=entering.reshape(write.shape)))
    return y, final.reshape(write.shape)


def _compose(parts: Parts, through: Array, write: Array, ids: Array, initial_state: Array | None) -> tuple[Array, Array]:
    """The state [B, H, K, V] that enters this part (zero where it begins a segment), and the one that leaves the last.

    Args:
      through: A, [B, H, K or 1] for a decay or [B, H, K, K].
      write: B, [B, H, K, V].
      ids: [B, T / count] segment ids of the part.
      initial_state: enters the first part.
    """
    start = jnp.zeros_like(write) if initial_state is None else initial_state.astype(write.dtype)
    if parts.exchange == "ring":
        return _handed_on(parts, through, write, ends(ids), start)
    batch, heads = write.shape[:2]
    border = ends(ids)
    halves = jnp.concatenate([border >> 16, border & 0xFFFF], axis=1)[:, None]  # [B, 1, 4], each exact as a float
    arrays = (write, through, jnp.broadcast_to(halves, (batch, heads, 4)).astype(write.dtype))
    flat = jnp.concatenate([x.reshape(batch, heads, -1) for x in arrays], axis=-1)
    sizes = [write[0, 0].size, write[0, 0].size + through[0, 0].size]

    def step(carry: tuple[Array, Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        state, open_id, entering = carry
        number, flat = part
        write_, through_, halves = jnp.split(flat, sizes, axis=-1)
        write_, through_ = write_.reshape(write.shape), through_.reshape(through.shape)
        upper, lower = jnp.split(halves[:, 0].astype(ids.dtype), 2, axis=-1)
        first, last = jnp.moveaxis(upper << 16 | lower, 1, 0)
        state = _entering(state, open_id, first)
        entering = jnp.where(number == parts.index, state, entering)
        return (*_leaving(state, open_id, through_, write_, first, last), entering), None

    unknown = jnp.full((batch,), -1, ids.dtype)
    (final, _, entering), _ = jax.lax.scan(
        jax.checkpoint(step), (start, unknown, jnp.zeros_like(start)), (jnp.arange(parts.count), parts.stack(flat))
    )
    return entering, final


def _handed_on(parts: Parts, through: Array, write: Array, border: Array, start: Array) -> tuple[Array, Array]:
    """`_compose` in a ring: what enters a part is right as soon as what enters those before it is."""
    first, last = jnp.moveaxis(border, 1, 0)
    unknown = jnp.full_like(first, -1)
    leaving = lambda state, open_id: _leaving(_entering(state, open_id, first), open_id, through, write, first, last)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        state, open_id = (parts.passed_on(x) for x in leaving(*carry))
        return (jnp.where(parts.index == 0, start, state), jnp.where(parts.index == 0, unknown, open_id)), None

    (state, open_id), _ = jax.lax.scan(jax.checkpoint(step), (start, unknown), length=parts.count - 1)
    final, _ = leaving(state, open_id)
    final = jax.lax.psum(jnp.where(parts.index == parts.count - 1, final, 0), parts.axes)
    return _entering(state, open_id, first), final


def _entering(state: Array, open_id: Array, first: Array) -> Array:
    """What of the state before it a part goes on with.

    Args:
      state: [B, H, K, V].
      open_id: [B], the segment that the state is of; -1 of an initial state, which is of any.
      first: [B], the segment of the part's first token; 0 where it has none.
    """
    return jnp.where(((first == open_id) | (open_id < 0) | (first == 0))[:, None, None, None], state, 0)


def _leaving(state: Array, open_id: Array, through: Array, write: Array, first: Array, last: Array) -> tuple[Array, Array]:
    """The state that leaves a part which `state` enters, and the segment that it is of."""
    passed = (
        through[..., None] * state if through.ndim == 3 else jnp.einsum("bhij,bhjv->bhiv", through, state, precision="highest")
    )
    return jnp.where((first == 0)[:, None, None, None], state, passed + write), jnp.where(last > 0, last, open_id)


DECAY = ContextRule(_decay)
DELTA_RULE = ContextRule(_delta_rule)
CHANNELS = ContextRule(_channels)

"""Linear recurrences on parts of sequences: every device says what its part does to a state, and all of them learn it at once.

A part maps the state S that enters it to A S + B. A and B need no other part, so one all-gather of them, whose size does not depend on
the length of the sequence, tells each device the state that enters its own (LASP-2, arXiv 2502.07563, for decays; the delta rule's A
is a matrix). A part that begins with a new segment takes nothing from the one before it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.context import ContextRule, Parts, ends
from plait.kernels.recurrence import Results
from plait.kernels.shapes import accumulation_dtype, matmul_precision

Array = jax.Array
Op = Callable[..., Results]


def _unsupported(count: int, *args: Array | None, **options: Any) -> None:
    """Any can be cut."""


def _decays(
    op: Op,
    parts: Parts,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    *,
    initial_state: Array | None,
    segment_ids: Array | None,
    **options: Any,
) -> Results:
    """B is one product over the part's last segment, and the op then runs from the state that enters."""
    dtype = accumulation_dtype(q, k, v)
    gates = g.astype(dtype) if g.ndim == 4 else g.astype(dtype)[..., None]  # [B, T, Hv, K or 1]
    ids = jnp.ones(v.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    index, real = chunking.segment_index(ids)
    gates = jnp.where(real[..., None, None], gates, 0)
    later = jnp.flip(jnp.cumsum(jnp.flip(gates, 1), axis=1), 1) - gates
    weight = jnp.exp(later) * ((index == index[:, -1:]) & real)[..., None, None]
    k_out = jnp.repeat(k.astype(dtype), v.shape[2] // k.shape[2], axis=2) * weight
    write = jnp.einsum("bthk,bthv->bhkv", k_out, v.astype(dtype), precision=matmul_precision(q.dtype))
    decay = jnp.exp(gates.sum(1)) * (index[:, -1] == 0)[:, None, None]  # [B, Hv, K or 1]
    entering, final = _compose(parts, decay, write, ids, initial_state)
    o, _, *stats = op(q, k, v, g, initial_state=entering, segment_ids=segment_ids, **options)
    return (o, final, *stats)


def _delta_rule(
    op: Op,
    parts: Parts,
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    *,
    initial_state: Array | None,
    segment_ids: Array | None,
    return_stats: bool,
    **options: Any,
) -> Results:
    """K columns beside the values, written with nothing and begun at the identity, show A at the end, and at each token the query
    that reads the entering state: o = o' + (P^T q)^T S, P being the product of the steps so far."""
    dtype = accumulation_dtype(q, k, v)
    (batch, _, heads, value_dim), key_dim = v.shape, k.shape[3]
    ids = jnp.ones(v.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    wide = jnp.concatenate([v, jnp.zeros((*v.shape[:3], key_dim), v.dtype)], axis=-1)
    start = jnp.concatenate([jnp.zeros((key_dim, value_dim), dtype), jnp.eye(key_dim, dtype=dtype)], axis=-1)
    start = jnp.broadcast_to(start, (batch, heads, *start.shape))
    inputs: dict[str, Any] = {"segment_ids": segment_ids, **options}
    o, state = op(q, k, wide, g, beta, initial_state=start, return_stats=False, **inputs)
    entering, final = _compose(parts, state[..., value_dim:], state[..., :value_dim], ids, initial_state)
    if return_stats:  # what a token writes depends on the state it finds
        o, _, stats = op(q, k, v, g, beta, initial_state=entering, return_stats=True, **inputs)
        return o, final, stats
    precision = matmul_precision(q.dtype)
    read = jnp.einsum("bthk,bhkv->bthv", o[..., value_dim:].astype(dtype), entering.astype(dtype), precision=precision)
    return (o[..., :value_dim].astype(dtype) + read).astype(q.dtype), final


def _compose(parts: Parts, through: Array, write: Array, ids: Array, initial_state: Array | None) -> tuple[Array, Array]:
    """The state [B, H, K, V] that enters this part (zero where it begins a segment), and the one that leaves the last.

    Args:
      through: A, [B, H, K or 1] for a decay or [B, H, K, K].
      write: B, [B, H, K, V].
      ids: [B, T / count] segment ids of the part.
      initial_state: enters the first part.
    """
    batch, heads = write.shape[:2]
    border = ends(ids)[:, None].astype(write.dtype)  # [B, 1, 2], exact up to 2^24
    arrays = (write, through, jnp.broadcast_to(border, (batch, heads, 2)))
    flat = jnp.concatenate([x.reshape(batch, heads, -1) for x in arrays], axis=-1)
    sizes = [write[0, 0].size, write[0, 0].size + through[0, 0].size]

    def step(carry: tuple[Array, Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        state, open_id, entering = carry
        number, flat = part
        write_, through_, border = jnp.split(flat, sizes, axis=-1)
        write_, through_ = write_.reshape(write.shape), through_.reshape(through.shape)
        first, last = border[:, 0, 0], border[:, 0, 1]
        goes_on = (first == open_id) | (open_id < 0)
        state = jnp.where((goes_on | (first == 0))[:, None, None, None], state, 0)
        entering = jnp.where(number == parts.index, state, entering)
        passed = (
            through_[..., None] * state
            if through.ndim == 3
            else jnp.einsum("bhij,bhjv->bhiv", through_, state, precision="highest")
        )
        state = jnp.where((first == 0)[:, None, None, None], state, passed + write_)
        return (state, jnp.where(last > 0, last, open_id), entering), None

    start = jnp.zeros_like(write) if initial_state is None else initial_state.astype(write.dtype)
    unknown = jnp.full((batch,), -1, write.dtype)
    (final, _, entering), _ = jax.lax.scan(
        jax.checkpoint(step), (start, unknown, jnp.zeros_like(start)), (jnp.arange(parts.count), parts.stack(flat))
    )
    return entering, final


DECAYS = ContextRule(_decays, _unsupported)
DELTA_RULE = ContextRule(_delta_rule, _unsupported)

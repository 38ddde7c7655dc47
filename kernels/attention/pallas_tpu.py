"""Flash attention for TPU (Mosaic), forward and backward, with the statistics of each row inside.

Every tile is kept transposed, keys by queries [N, M]: then the maximum, the sums and the statistics of a query are sums over
sublanes, and what belongs to a query is a row [1, M] that broadcasts for nothing. Outputs of queries accumulate transposed too.
With z the scaled logits, one tile of the forward pass updates
  m' = max(m, max_j z_j), p_j = exp(z_j - m'), l <- e^(m-m') l + sum_j p_j, u <- e^(m-m') (u - (m' - m) l) + sum_j p_j (z_j - m')
and o likewise; then lse = m + log l and the entropy is log l - u / l. The kernels keep m unscaled, u in bits, and use powers of 2.
A tile is worked off in parts, which leaves the compiler room to run products and exponentials side by side; the statistics ride along.
The backward pass recomputes A; what it needs of each row is in `per_query`.
Sink logits need no kernel: they scale a row's output by the share of its keys, which is done, and differentiated, outside.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall, MassCall, RoutedCall
from plait.kernels.attention.per_query import first_mass, gradient_rows, with_bias, with_sinks
from plait.kernels.attention.reference import MASKED as HIDDEN
from plait.kernels.attention.reference import AttentionStats, lse_alone
from plait.kernels.attention.ties import longest_keys, ties
from plait.kernels.attention.tpu import kernels, selected
from plait.kernels.attention.tpu.best_tiles import BFLOAT16, FLOAT32, SELECTED
from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.steps import ENTRY_BITS, entry_bits, most_steps
from plait.kernels.attention.tpu.tiling import LANES, Operands, Problem, Tiles
from plait.kernels.attention.tpu.tokens import chosen_tokens
from plait.kernels.attention.visits import Layout, laid_out, layout_of
from plait.kernels.target import current, not_on
from plait.kernels.tokens import Tokens

Array = jax.Array

MIN_QUERIES = 32
"""Fewer queries than this (decoding) fill too little of a tile."""

MAX_HEAD_DIM = 256
MAX_TABLE = 1 << 17
"""Entries of a list of tiles in scalar memory (4 bytes each; the core has 1 MiB)."""
MAX_LIST = MAX_TABLE // 4
"""Where blocks are selected: four lists of so many are there at a time, a step's and that of the one behind it, each beside what comes next."""


def choose_tiles(generation: str, key_dim: int, value_dim: int, dtype: Any) -> Tiles:
    """The tiles of a generation; one that has none of its own has those of v5e."""
    if jnp.dtype(dtype).itemsize > 2:
        return FLOAT32
    by_width = BFLOAT16.get(generation, BFLOAT16["v5e"])
    return by_width[min(width for width in by_width if width >= max(key_dim, value_dim))]


def unsupported(call: AttentionCall) -> str | None:
    """Why this kernel cannot serve a call, or None."""
    return _unsupported(call, layout_of(call), 1)


def routed_unsupported(call: RoutedCall) -> str | None:
    """Why this kernel cannot serve a call of `routed_attention`, or None."""
    return _unsupported(call, _routed_layout(call), call.q.shape[2])


def column_mass_unsupported(call: MassCall) -> str | None:
    """Why this kernel cannot serve a call of `column_mass`, or None."""
    return _unsupported(call, layout_of(call), 1)


def _by_token(call: AttentionCall) -> bool:
    return call.selected is not None and call.selected.block_size == 1


def _routed_layout(call: RoutedCall) -> Layout:
    """The queries of a head stand where routing puts them."""
    return Layout(call.mask, call.q.shape[1], call.k.shape[1], own_keys=False, packed=True)


def _unsupported(call: AttentionCall, layout: Layout, heads: int) -> str | None:
    """Args: `heads` that have a list of tiles of their own."""
    q, k = call.q, call.k
    v = k if call.v is None else call.v
    if reason := not_on("tpu"):
        return reason
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"q, k and v are {', '.join(sorted(dtypes))}, not all float32 or all bfloat16"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM and not _by_token(call):
        return f"head dims {q.shape[-1]} and {v.shape[-1]} exceed {MAX_HEAD_DIM}"
    if q.shape[1] < MIN_QUERIES or k.shape[1] < MIN_QUERIES:
        return f"{q.shape[1]} queries and {k.shape[1]} keys fill no tile of at least {MIN_QUERIES}"
    if call.bias is not None:
        return "it has no bias by distance, only one of low rank"
    if call.scale <= 0:
        return f"the scale {call.scale} is not above 0"
    if call.selected is not None:
        if not call.document_keys:
            return "blocks are selected among keys that are not the tokens of the queries' documents, in order"
        if _by_token(call):
            return chosen_tokens.unsupported(call)
        cut = _cut(call)
        if (listed := cut.longest_list(_sizes(call)[1])) > MAX_LIST:
            return f"a list of {listed} tiles exceeds the {MAX_LIST} that scalar memory holds; use shorter sequences"
        return call.selected.unfit(cut.keys)
    tiles = _tiles(call, layout)
    for tile in {tiles.forward, tiles.gradients}:
        steps = q.shape[0] * heads * max(most_steps(layout, tile.block_q, tile.block_kv))
        if steps > MAX_TABLE:
            return (
                f"{q.shape[0]} x {heads} x {steps // heads // q.shape[0]} tiles exceed the {MAX_TABLE} that scalar memory holds"
            )
        blocks = -(-q.shape[1] // tile.block_q), -(-k.shape[1] // tile.block_kv)
        if entry_bits(blocks[0], heads, blocks[1]) > ENTRY_BITS:
            return f"{blocks[0]} x {heads} x {blocks[1]} blocks exceed the numbers of one entry; use shorter sequences"
    return None


def _tiles(call: AttentionCall, layout: Layout) -> Tiles:
    """The tiles of a call that selects no blocks; where keys are not the queries' own, a window of less than four tiles gets smaller ones."""
    q, k, mask = call.q, call.k, call.mask
    tiles = choose_tiles(_generation(), q.shape[-1], (k if call.v is None else call.v).shape[-1], q.dtype)
    if layout.own_keys:
        return tiles.sized(layout).fit(q.shape[1], k.shape[1])
    reach = mask.reach_back()
    most = 512 if reach is not None and reach < 4096 else 1024
    if mask.alignment > 1:
        most = min(most, max(LANES, mask.alignment))
    return tiles.fit(min(most, q.shape[1]), min(most, k.shape[1]))


def _generation() -> str:
    here = current()
    return "v5e" if here is None else here.generation


def _cut(call: AttentionCall) -> Cut:
    """How the work of a call that selects blocks is cut."""
    heads, lengths = _sizes(call)
    return Cut.of(heads, lengths, call.selected, *SELECTED[call.q.dtype.itemsize], wide=_wide(call))


def _wide(call: AttentionCall) -> bool:
    """Blocks are selected on a chip whose matrix unit is 256 wide, with operands of 16 bits."""
    here = current()
    return call.q.dtype.itemsize == 2 and here is not None and here.matrix_unit == 256


def _sizes(call: AttentionCall) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads of queries and of keys, and how many queries and keys there are."""
    return (call.q.shape[2], call.k.shape[2]), (call.q.shape[1], call.k.shape[1])


def _problem(call: AttentionCall, layout: Layout) -> Problem:
    return Problem(
        layout=layout,
        tiles=_tiles(call, layout) if call.selected is None else _cut(call),
        scale=call.scale,
        sigmoid=call.sigmoid,
        stats=call.return_stats,
        soft_cap=call.logit_soft_cap,
    )


def attention(call: AttentionCall) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; always a pair here."""
    layout, queries, keys = laid_out(call)
    o, stats = chosen_tokens.attention(call) if _by_token(call) else _by_tiles(call, layout, queries, keys)
    if call.return_stats:
        stats.append(first_mass(call, stats[0], queries, keys))
    if call.sink_logits is not None:
        o, stats = with_sinks(o, stats, call.sink_logits)
    if call.return_lse and not call.return_stats:
        return o, lse_alone(stats[0])
    return o, AttentionStats(*stats) if call.return_stats else None


def _by_tiles(call: AttentionCall, layout: Layout, queries: Tokens, keys: Tokens) -> tuple[Array, list[Array]]:
    """o [B, T, H, V] and the rows [B, T, H] of each query."""
    problem = _problem(call, layout)
    bias = jnp.zeros(call.q.shape[2], jnp.float32) if call.sigmoid_bias is None else call.sigmoid_bias.astype(jnp.float32)
    q_side, k_side = jax.tree.map(lambda x: x[:, None], (queries, keys))
    q_heads, k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (call.q, call.k, call.v))
    whole = None
    if call.whole is not None:
        whole = jnp.moveaxis(call.whole[0], 1, 3), (jnp.swapaxes(call.whole[1], 1, 2),)
    o, rows = _flash(problem, Operands(q_heads, k_heads, v_heads, bias, q_side, k_side, call.selected), whole)
    return jnp.moveaxis(o, 3, 1), [jnp.moveaxis(x, 2, 1) for x in rows]


def routed_attention(call: RoutedCall) -> Array:
    """See `plait.kernels.routed_attention`: each head's queries are gathered at its front, and tiles without one are not visited."""
    own, tokens = call.sides
    if call.own_keys:
        own = tokens = replace(tokens, segment_ids=tokens.numbered())
    active = jnp.swapaxes(call.active, 1, 2)  # [B, H, T]
    order = jnp.argsort(~active, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    gather = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, active.shape), order, axis=-1)
    segment_ids = gather(jnp.where(active, own.segment_ids[:, None], 0))
    queries = Tokens(segment_ids=segment_ids, positions=gather(own.positions[:, None]))
    problem = _problem(call, _routed_layout(call))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (call.q, call.k, call.v))
    bias = jnp.zeros(q.shape[1], jnp.float32)
    keys = jax.tree.map(lambda x: x[:, None], tokens)
    o, (lse,) = _flash(problem, Operands(_permuted(q, order, back), k, v, bias, queries, keys), None)
    if call.sinks is not None:
        o = (o * jax.nn.sigmoid(lse - call.sinks.astype(jnp.float32).reshape(1, -1, 1))[:, :, None]).astype(o.dtype)
    return jnp.swapaxes(_permuted(jnp.swapaxes(o, 2, 3), back, order), 1, 2)


def column_mass(call: MassCall) -> Array:
    """See `plait.kernels.column_mass`."""
    layout, queries, keys = laid_out(call)
    q_side, k_side = jax.tree.map(lambda x: x[:, None], (queries, keys))
    q, k, lse = (jnp.swapaxes(x, 1, 2) for x in (call.q, call.k, jnp.where(call.lse > HIDDEN / 2, call.lse, -HIDDEN)))
    bias = jnp.zeros(q.shape[1], jnp.float32)
    x = Operands(q, k, None, bias, q_side, k_side, call.selected)
    return jnp.swapaxes(_kernels(x).column_mass(_problem(call, layout), x, lse), 1, 2)


@jax.custom_vjp
def _permuted(x: Array, order: Array, back: Array) -> Array:
    """x [B, H, T, K] with the tokens of each head in `order` [B, H, T], whose inverse is `back`."""
    return jnp.take_along_axis(x, order[..., None], axis=2)


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda saved, d_x: (_permuted(d_x, saved[1], saved[0]), None, None),
)


def _kernels(x: Operands) -> Any:
    """The module of the kernels that serve these operands."""
    return kernels if x.selected is None else selected


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(problem: Problem, x: Operands, whole: Any) -> tuple[Array, tuple[Array, ...]]:
    """`kernels.forward` with its gradients; where the `whole` is known, with those of these keys' share in it (see `AttentionCall`)."""
    return _flash_forward(problem, x, whole)[0]


def _flash_forward(problem: Problem, x: Operands, whole: Any) -> Any:
    o, rows = _kernels(x).forward(problem, x) if whole is None else whole
    return (o, with_bias(rows, x.bias) if problem.sigmoid and problem.stats else rows), (x, o, rows)


def _flash_backward(problem: Problem, saved: Any, cotangents: tuple[Array, tuple[Array, ...]]) -> Any:
    x, o, rows = saved
    d_o, d_rows = cotangents
    delta = jnp.sum(d_o.astype(jnp.float32) * o, axis=2)
    q, k = jnp.swapaxes(x.q, 1, 2), jnp.swapaxes(x.k, 1, 2)
    queries, keys = jax.tree.map(lambda x: x[:, 0], (x.queries, x.keys))
    near = lambda: jnp.swapaxes(ties(problem.scale, q, longest_keys(problem.layout, queries, keys, k)), 1, 2)
    bias = x.bias if problem.sigmoid else None
    rows = gradient_rows(rows, d_rows, delta, sigmoid_bias=bias, near=near, soft_cap=problem.soft_cap)
    if problem.sigmoid and problem.stats:
        d_o = (d_o * rows[-1][:, :, None]).astype(d_o.dtype)
    d_o = jnp.swapaxes(d_o, 2, 3)
    d_q, d_k, d_v, d_bias = _kernels(x).all_gradients(problem, x, d_o, rows)
    return Operands(d_q, d_k, d_v, d_bias, None, None, None), None


_flash.defvjp(_flash_forward, _flash_backward)

"""The kernels of attention to selected blocks for TPU: forward, gradients, column mass.

One kernel makes all gradients: scores are made once for them, and what moves is keys and their sums, not the queries of many heads.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.tiling import Operands, Problem
from plait.kernels.attention.tpu.turned import Turned
from plait.kernels.attention.tpu.walk import Stage, Tile, Walk, Work
from plait.kernels.attention.tpu.weights import (
    LOG2_E,
    NN,
    NT,
    Sums,
    Weighed,
    dot,
    gradients,
    products,
    shown,
    stacked_rows,
)

Array = jax.Array


def forward(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """See `plait.kernels.attention.tpu.kernels.forward`."""
    cut, length, value_dim = problem.tiles, x.q.shape[2], x.v.shape[3]

    def begin(problem: Problem, outs: Any, state: Any) -> Work:
        o, rows = outs
        sums = Sums(*state)
        sums.clear()

        def rest(tile: Tile) -> tuple[Sequence[Stage], Any]:
            values, parts = tile.v.T, tile.rectangles

            def weights(n: int, z: Array) -> Weighed:
                at, _, visible, chosen = parts[n]
                return sums.weigh(problem, tile.bias[:, at], z, visible, at, values.dtype, chosen)

            def outputs(n: int, weighed: Weighed) -> None:
                sums.collect(values[:, parts[n].keys], weighed, parts[n].queries)

            return (weights, outputs), lambda: ()

        def finish(bias: Any) -> None:
            values, found = sums.results(problem, bias)
            for n in range(cut.heads):
                at = slice(n * cut.queries, (n + 1) * cut.queries)
                o[0, n] = values[:, at].astype(o.dtype)
                for i, row in enumerate(found):
                    rows[0, n, i : i + 1] = row[:, at]

        return Work(lambda _: None, lambda tile, at, keys: products(problem, tile.k[keys], tile.q[at]), rest, finish)

    num_rows = 3 if problem.stats else 1
    o, rows = Walk(problem, x, x.q.shape[3] + value_dim, forward=True).over_queries(
        begin,
        "selected_attention_forward",
        outputs=[(value_dim, x.q.dtype), (num_rows, jnp.float32)],
        scratch=Sums.of(problem, value_dim, cut.heads * cut.queries, pltpu.VMEM),
    )
    return o[..., :length], tuple(rows[:, :, i, :length] for i in range(num_rows))


def all_gradients(problem: Problem, x: Operands, d_o: Array, rows: Sequence[Array]) -> tuple[Array, Array, Array, Array]:
    """See `plait.kernels.attention.tpu.kernels.all_gradients`."""
    cut, length, (key_dim, value_dim), num_keys = problem.tiles, x.q.shape[2], (x.k.shape[3], x.v.shape[3]), x.k.shape[2]

    def begin(problem: Problem, outs: Any, state: Any) -> Work:
        d_q, d_bias = outs
        (acc, shared_acc), turned = state[:2], Turned.at(state[2:])
        acc[...] = jnp.zeros_like(acc)
        shared_acc[...] = jnp.zeros_like(shared_acc)

        def prepare(tile: Tile) -> None:
            if turned is not None:
                turned.take(tile.q, tile.d_o)

        def factors(tile: Tile, at: slice, keys: slice) -> tuple[Array, Array]:
            if turned is not None:
                return products(problem, tile.k[keys], turned.q[:, at], NN), dot(tile.v[keys], turned.d_o[:, at], NN)
            return products(problem, tile.k[keys], tile.q[at]), dot(tile.v[keys], tile.d_o[at], NT)

        def rest(tile: Tile) -> tuple[Sequence[Stage], Any]:
            k_columns, parts = tile.k.T, tile.rectangles
            added: dict[int, tuple[Array, Array]] = {}

            def weights(n: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
                at, _, visible, chosen = parts[n]
                weights, d_logits, shared = gradients(problem, tile.bias[:, at], *found, tile.rows[:, at], visible, chosen)
                if problem.sigmoid:
                    shared_acc[:, at] += jnp.sum(shared, axis=0, keepdims=True)
                both = weights.astype(tile.d_o.dtype), d_logits.astype(tile.k.dtype)
                if turned is not None:
                    turned.put(n, *both)
                return both

            def add(n: int, both: tuple[Array, Array]) -> None:
                at, keys = parts[n][:2]
                weights, d_logits = both
                acc[:, at] += dot(k_columns[:, keys], d_logits, NN)  # [K, M]
                if turned is None:
                    of_k, of_v = dot(d_logits, tile.q[at], NN), dot(weights, tile.d_o[at], NN)  # [N, K], [N, V]
                else:
                    of_k, of_v = turned.of_keys(n, at, keys.stop - keys.start)  # [K, N], [V, N]
                more = problem.scale * of_k, of_v
                before = added.get(keys.start)
                added[keys.start] = more if before is None else (before[0] + more[0], before[1] + more[1])

            def sums() -> Sequence[Array]:
                channels, tokens = (1, 0) if turned is None else (0, 1)
                of = [jnp.concatenate(added[start], axis=channels) for start in sorted(added)]
                found = jnp.concatenate(of, axis=tokens)
                return [found if problem.sums_by_key_column or turned is None else found.T]

            return (weights, add), sums

        def finish(_: Any) -> None:
            for n in range(cut.heads):
                at = slice(n * cut.queries, (n + 1) * cut.queries)
                d_q[0, n] = (problem.scale * acc[:, at]).astype(d_q.dtype)
                d_bias[0, n] = shared_acc[:, at]

        return Work(prepare, factors, rest, finish)

    num_rows = cut.heads * cut.queries
    walk = Walk(problem, x, 3 * key_dim + 2 * value_dim, d_o=d_o, rows=stacked_rows(problem.unit, rows))
    turned = []
    if cut.wide:
        turned = Turned.of((key_dim, value_dim), num_rows, walk.rectangles.largest, x.q.dtype, pltpu.VMEM)
    d_q, d_bias, of_keys = walk.over_queries(
        begin,
        "selected_attention_gradients",
        outputs=[(key_dim, x.q.dtype), (1, jnp.float32)],
        scratch=[*(pltpu.VMEM((n, num_rows), jnp.float32) for n in (key_dim, 1)), *turned],
        sums=key_dim + value_dim,  # as one array, so that narrow heads fill its lanes
    )
    of_keys = jnp.swapaxes(of_keys, 3, 4) if problem.sums_by_key_column else of_keys  # [B, Hkv, NK, keys, K + V]
    of_keys = of_keys.reshape(*of_keys.shape[:2], -1, of_keys.shape[4])
    d_k, d_v = (
        total[:, :, :num_keys].astype(of.dtype) for total, of in ((of_keys[..., :key_dim], x.k), (of_keys[..., key_dim:], x.v))
    )
    return jnp.swapaxes(d_q[..., :length], 2, 3), d_k, d_v, jnp.sum(d_bias, axis=(0, 2, 3))


def column_mass(problem: Problem, x: Operands, lse: Array) -> Array:
    """See `plait.kernels.attention.tpu.kernels.column_mass`."""
    cut = problem.tiles

    def begin(problem: Problem, outs: Any, state: Any) -> Work:
        (total,) = state
        total[...] = jnp.zeros_like(total)

        def rest(tile: Tile) -> tuple[Sequence[Stage], Any]:
            def mass(n: int, z: Array) -> None:
                at, keys, visible, chosen = tile.rectangles[n]
                weights = shown(visible, jnp.exp2((problem.unit * LOG2_E) * z - tile.rows[:, at]), 0)
                weights = weights if chosen is None else jnp.where(chosen[0], weights, 0)
                for head in range(at.start // cut.queries, -(-at.stop // cut.queries)):
                    first = max(head * cut.queries, at.start)
                    of_head = weights[:, first - at.start : (head + 1) * cut.queries - at.start]
                    total[keys, head : head + 1] += jnp.sum(of_head, axis=1, keepdims=True)

            return (mass,), lambda: ()

        def finish(_: Any) -> None:
            outs[0][0, 0] = total[...]

        products_of = lambda tile, at, keys: products(problem, tile.k[keys], tile.q[at])
        return Work(lambda _: None, products_of, rest, finish)

    (mass,) = Walk(problem, x, x.q.shape[3], rows=(lse * LOG2_E)[:, :, None]).over_keys(
        begin,
        "selected_attention_column_mass",
        outputs=[(cut.heads, jnp.float32)],
        scratch=[pltpu.VMEM((cut.keys, cut.heads), jnp.float32)],
    )
    batch, bundles, _, heads = mass.shape
    return jnp.swapaxes(mass, 2, 3).reshape(batch, bundles * heads, -1)[:, :, : x.k.shape[2]]

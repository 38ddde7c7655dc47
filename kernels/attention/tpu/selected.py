"""The kernels of attention to selected blocks for TPU: forward, gradients, column mass.

One kernel makes all gradients: scores are made once for them, and what moves is keys and their sums, not the queries of many heads.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.tiling import Operands, Problem
from plait.kernels.attention.tpu.walk import Tile, Walk, Work
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
    staggered,
)

Array = jax.Array


def forward(problem: Problem, x: Operands) -> tuple[Array, tuple[Array, ...]]:
    """See `plait.kernels.attention.tpu.kernels.forward`."""
    cut, length, value_dim = problem.tiles, x.q.shape[2], x.v.shape[3]

    def begin(problem: Problem, outs: Any, state: Any) -> Work:
        o, rows = outs
        sums = Sums(*state)
        sums.clear()

        def work(tile: Tile) -> Sequence[Array]:
            values, parts = tile.v.T, tile.rectangles

            def logits(n: int, _: None) -> Array:
                return products(problem, tile.k[parts[n].keys], tile.q[parts[n].queries])

            def weights(n: int, z: Array) -> Weighed:
                at = parts[n].queries
                return sums.weigh(problem, tile.bias[:, at], z, parts[n].visible, at, values.dtype)

            def outputs(n: int, weighed: Weighed) -> None:
                sums.collect(values[:, parts[n].keys], weighed, parts[n].queries)

            staggered(tile.groups, logits, weights, outputs)
            return ()

        def finish(bias: Any) -> None:
            values, found = sums.results(problem, bias)
            for n in range(cut.heads):
                at = slice(n * cut.queries, (n + 1) * cut.queries)
                o[0, n] = values[:, at].astype(o.dtype)
                for i, row in enumerate(found):
                    rows[0, n, i : i + 1] = row[:, at]

        return work, finish

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
        (acc, shared_acc), upright = state, problem.sums_by_key_column
        acc[...] = jnp.zeros_like(acc)
        shared_acc[...] = jnp.zeros_like(shared_acc)

        def work(tile: Tile) -> Sequence[Array]:
            turned, parts = tile.k.T, tile.rectangles
            sides = [x.T for x in (tile.q, tile.d_o)] if upright else []  # [K, M], [V, M]
            added: dict[int, tuple[Array, Array]] = {}

            def factors(n: int, _: None) -> tuple[Array, Array]:
                at, keys = parts[n][:2]
                return products(problem, tile.k[keys], tile.q[at]), dot(tile.v[keys], tile.d_o[at], NT)

            def weights(n: int, found: tuple[Array, Array]) -> tuple[Array, Array]:
                at = parts[n].queries
                weights, d_logits, shared = gradients(problem, tile.bias[:, at], *found, tile.rows[:, at], parts[n].visible)
                if problem.sigmoid:
                    shared_acc[:, at] += jnp.sum(shared, axis=0, keepdims=True)
                return weights.astype(tile.d_o.dtype), d_logits.astype(tile.k.dtype)

            def add(n: int, found: tuple[Array, Array]) -> None:
                at, keys = parts[n][:2]
                weights, d_logits = found
                acc[:, at] += dot(turned[:, keys], d_logits, NN)  # [K, M]
                if upright:
                    of_k, of_v = (
                        dot(side[:, at], x, NT) for side, x in zip(sides, (d_logits, weights), strict=True)
                    )  # [K, N], [V, N]
                else:
                    of_k, of_v = dot(d_logits, tile.q[at], NN), dot(weights, tile.d_o[at], NN)
                more = problem.scale * of_k, of_v
                before = added.get(keys.start)
                added[keys.start] = more if before is None else (before[0] + more[0], before[1] + more[1])

            staggered(tile.groups, factors, weights, add)
            channels, tokens = (0, 1) if upright else (1, 0)
            return [jnp.concatenate([jnp.concatenate(added[start], axis=channels) for start in sorted(added)], axis=tokens)]

        def finish(_: Any) -> None:
            for n in range(cut.heads):
                at = slice(n * cut.queries, (n + 1) * cut.queries)
                d_q[0, n] = (problem.scale * acc[:, at]).astype(d_q.dtype)
                d_bias[0, n] = shared_acc[:, at]

        return work, finish

    d_q, d_bias, of_keys = Walk(
        problem, x, 3 * key_dim + 2 * value_dim, d_o=d_o, rows=stacked_rows(problem.unit, rows)
    ).over_queries(
        begin,
        "selected_attention_gradients",
        outputs=[(key_dim, x.q.dtype), (1, jnp.float32)],
        scratch=[pltpu.VMEM((n, cut.heads * cut.queries), jnp.float32) for n in (key_dim, 1)],
        sums=(key_dim + value_dim,),  # as one array, so that narrow heads fill its lanes
    )
    of_keys = jnp.swapaxes(of_keys, 2, 3) if problem.sums_by_key_column else of_keys
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

        def work(tile: Tile) -> Sequence[Array]:
            for at, keys, visible in tile.rectangles:
                z = products(problem, tile.k[keys], tile.q[at])
                weights = shown(visible, jnp.exp2((problem.unit * LOG2_E) * z - tile.rows[:, at]), 0)
                for n in range(at.start // cut.queries, -(-at.stop // cut.queries)):
                    first = max(n * cut.queries, at.start)
                    of_head = weights[:, first - at.start : (n + 1) * cut.queries - at.start]
                    total[keys, n : n + 1] += jnp.sum(of_head, axis=1, keepdims=True)
            return ()

        def finish(_: Any) -> None:
            outs[0][0, 0] = total[...]

        return work, finish

    (mass,) = Walk(problem, x, x.q.shape[3], rows=(lse * LOG2_E)[:, :, None]).over_keys(
        begin,
        "selected_attention_column_mass",
        outputs=[(cut.heads, jnp.float32)],
        scratch=[pltpu.VMEM((cut.keys, cut.heads), jnp.float32)],
    )
    batch, bundles, _, heads = mass.shape
    return jnp.swapaxes(mass, 2, 3).reshape(batch, bundles * heads, -1)[:, :, : x.k.shape[2]]

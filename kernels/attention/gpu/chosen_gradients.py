"""The gradients of attention to chosen tokens on Hopper; the forward pass, and what both share, is in `chosen_kernels`.

Weights are made again from lse. Gradients of keys and values are float32 sums in global memory, to which every query adds.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.attention.gpu import rows as by_row
from plait.kernels.attention.gpu.chosen_kernels import HALF, Launch, Operands, Problem, hidden, meet, numbers
from plait.kernels.attention.gpu.kernels import COMPUTE, LOG2E, ROWS

Array = jax.Array

LSE, C1, C, D_PEAK, EDGE = range(5)
"""The rows that the gradients read; the last three with statistics only."""


def gradients(problem: Problem, x: Operands, d_o: Array, given: Array) -> tuple[Array, Array, Array | None]:
    """dq [P * blocks, R, K], and dk and dv of the rows of k and v, float32, dv None where those are in the keys; sums over queries are
    in no fixed order.

    Args:
      problem, x: as in `forward`.
      d_o: [P * blocks, R, V].
      given: float32 [P * blocks, 2 or 5, 64]: the rows of `per_query.gradient_rows`.
    """
    launch = Launch(problem, x, HALF)
    summed = {"d_k": x.k} | ({} if x.v is None else {"d_v": x.v})
    outputs = {"d_q": jax.ShapeDtypeStruct(x.q.shape, launch.dtype)}
    sums: dict[str, Any] = {}
    if gpu.interpreted():  # added after the kernel
        by_query = lambda y: jax.ShapeDtypeStruct((x.q.shape[0], y.shape[1], launch.num_chosen), jnp.float32)
        outputs |= {name: by_query(y) for name, y in summed.items()}
    else:
        sums = {name: jax.new_ref(jnp.zeros(y.shape, jnp.float32)) for name, y in summed.items()}
    d_q, *terms = launch.run(
        lambda refs, *where: _gradient_rows(launch, refs, *where),
        "chosen_tokens_gradients",
        inputs={"d_o": d_o, "given": given} | sums,
        outputs=outputs,
        scratch={
            "q_tile": launch.tile(ROWS, problem.key_dim),
            "d_o_tile": launch.tile(ROWS, problem.value_dim),
            "weights": launch.tile(COMPUTE, ROWS, HALF),
            "logits": gpu.tile((ROWS, HALF), jnp.float32),
            "ring": launch.ring(),
            "arrived": plgpu.Barrier(num_arrivals=launch.arrivals(2)),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        },
        products=3 * problem.key_dim + 2 * problem.value_dim,
    )
    if sums:
        d_k, *d_v = (jax.freeze(ref) for ref in sums.values())
    else:
        rows = jnp.repeat(x.rows, problem.blocks, axis=0)
        seen = rows[:, :, None] >= 0
        d_k, *d_v = (
            jnp.zeros(y.shape, jnp.float32).at[rows].add(jnp.where(seen, jnp.swapaxes(term, 1, 2), 0))
            for term, y in zip(terms, summed.values(), strict=True)
        )
    return d_q, d_k, d_v[0] if d_v else None


def _gradient_rows(launch: Launch, refs: Any, block: Array, pair: Array, wg: Array, count: Array) -> None:
    """One warpgroup makes the weights A, the other dz of do . v; both then sum halves of the channels of dq, and of dk and dv."""
    problem, key_dim, value_dim = launch.problem, launch.key_dim, launch.value_dim
    copies = (refs.q_tile, refs.q.at[block]), (refs.d_o_tile, refs.d_o.at[block])
    pl.when(wg == 0)(lambda: launch.fetch(refs, *copies))
    given = [gpu.load(refs.given.at[block, r], 0) for r in range(refs.given.shape[1])]
    plgpu.barrier_wait(refs.arrived)
    row = lambda r: gpu.rows_to(given[r], HALF)
    pieces = _pieces(key_dim // COMPUTE)

    def logit_gradients(z: Array, terms: Array) -> Array:
        e = z - row(LSE)
        terms += row(C1)
        if problem.stats:
            terms += jnp.where(z >= row(EDGE), row(D_PEAK), jnp.zeros_like(z)) - row(C) * e
        return problem.scale * jnp.exp2(e) * terms

    def step(n: Array, accs: list[Array]) -> list[Array]:
        key_tile, *rest = refs.ring.read(n)
        value_tile = rest[0] if rest else key_tile.at[:, pl.ds(0, value_dim)]

        @pl.when(wg == 0)
        def _weights() -> None:
            rows = numbers(refs, pair, n * HALF)
            [z] = gpu.products((refs.q_tile, key_tile.transpose((1, 0))))
            z = hidden(rows, z * (problem.scale * LOG2E))
            refs.logits[...] = z
            meet(refs)
            refs.weights.at[0][...] = jnp.exp2(z - row(LSE)).astype(launch.dtype)

        @pl.when(wg == 1)
        def _logit_gradients() -> None:
            [terms] = gpu.products((refs.d_o_tile, value_tile.transpose((1, 0))))
            meet(refs)
            z = plgpu.load(refs.logits, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]
            refs.weights.at[1][...] = logit_gradients(z, terms).astype(launch.dtype)

        meet(refs)
        weights, d_logits = refs.weights.at[0], refs.weights.at[1]
        channels = [pl.ds(wg * (key_dim // COMPUTE) + first, width) for first, width in pieces]
        accs = gpu.accumulate(*((acc, d_logits, key_tile.at[:, at]) for acc, at in zip(accs, channels, strict=True)))
        refs.ring.release(n)
        _key_sums(launch, refs, block, pair, wg, n, weights, d_logits)
        return accs

    accs = jax.lax.fori_loop(0, count, step, [gpu.full((ROWS, width), 0.0) for _, width in pieces])
    meet(refs)
    for acc, (first, _) in zip(accs, pieces, strict=True):
        launch.put(refs, wg, acc, refs.d_q.at[block], wg * (key_dim // COMPUTE) + first)


def _pieces(width: int) -> list[tuple[int, int]]:
    """Where products of at most 256 columns, multiples of 32, begin in `width`, and how wide they are."""
    if width <= 256:
        return [(0, width)]
    first = -(-width // 64) * HALF
    return [(0, first), (first, width - first)]


def _key_sums(launch: Launch, refs: Any, block: Array, pair: Array, wg: Array, n: Array, weights: Any, d_logits: Any) -> None:
    """Adds to dk and dv of a tile's keys, 64 channels by keys at a time, of which the warpgroups take turns."""

    rows = numbers(refs, pair, n * HALF)

    def chunk(name: str, number: Array | int) -> None:
        at = pl.ds(number * ROWS, ROWS)
        terms = {"d_k": (refs.q_tile, d_logits), "d_v": (refs.d_o_tile, weights)}
        first, *more = ((tile.at[:, at].transpose((1, 0)), right) for tile, right in (terms[x] for x in terms if x in name))
        [acc] = gpu.products(first)
        for term in more:
            [acc] = gpu.accumulate((acc, *term))
        target = refs.d_v if name == "d_v" else refs.d_k
        if gpu.interpreted():
            target.at[block, at, pl.ds(n * HALF, HALF)][...] = acc
        else:
            by_row.add(target.at[:, at], acc, rows)

    keys, values = launch.key_dim // ROWS, launch.value_dim // ROWS
    if launch.own_values:
        spans = [("d_k", 0, keys), ("d_v", 0, values)]
    else:
        spans = [("d_k + d_v", 0, values), ("d_k", values, keys)]
    for name, first, last in spans:
        turns = partial(lambda name, first, i, _: chunk(name, first + COMPUTE * i + wg), name, first)
        jax.lax.fori_loop(0, (last - first) // COMPUTE, turns, None)
        if (last - first) % COMPUTE:
            pl.when(wg == 0)(partial(chunk, name, last - 1))

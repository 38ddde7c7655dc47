"""The backward kernels of flash attention for Hopper: query gradients, and key and value gradients. The math is in `pallas_gpu`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels import gpu
from plait.kernels.attention.gpu.kernels import (
    BLOCK,
    COMPUTE,
    COMPUTE_REGISTERS,
    LN2,
    LOG2E,
    MEMORY_REGISTERS,
    ROWS,
    Operands,
    Plan,
    Problem,
    Tile,
    capped,
    copy_keys,
    log2_sigmoid,
    unhoisted,
)  # fmt: skip
from plait.kernels.attention.visits import MASKED

Array = jax.Array

LSE, C1, C, D_FIRST, D_PEAK, EDGE, SUM = range(7)
"""The rows that the kernels read, as `in_units` makes them; the last five with statistics only, and the last of the sigmoid."""


def in_units(rows: Sequence[Array], read: Sequence[Array], *, sigmoid: bool) -> Array:
    """Rows [B, H, T] of `per_query.gradient_rows`, `read`, as the kernels want them: float32 [B, H, R, T], logits in units of log 2.

    `rows` are those of the forward pass. The softmax's dmax is divided by the weight of the maximum, so that it can join the
    other terms before they are multiplied by the weights.
    """
    read = [x * unit for x, unit in zip(read, (LOG2E, 1.0, LN2, 1.0, 1.0, LOG2E, 1.0))]
    if len(rows) > 1 and not sigmoid:
        read[D_PEAK] *= jnp.exp(rows[0] - rows[1])
    return jnp.stack(read, axis=2).astype(jnp.float32)


class _Weights(NamedTuple):
    """A tile of the recomputed weights, and what their gradient starts from."""

    weights: Array
    terms: Array
    """What the statistics and lse add to do . v."""
    z: Array

    def d_logits(self, problem: Problem, d_weights: Array, row: Callable[[int], Array]) -> tuple[Array, Array]:
        """dz, and the part of it that the sigmoid's bias shares, from the sum of `terms` and do . v."""
        d_logits = shared = d_weights * self.weights
        if problem.sigmoid:
            weights = row(SUM) * self.weights if problem.stats else self.weights
            d_logits = shared = shared * (1 - weights)
            if problem.stats:
                d_logits += _where_highest(self.z, row)
        if problem.soft_cap is not None:
            highest = problem.soft_cap * LOG2E
            d_logits *= 1 - jnp.square(jnp.maximum(self.z, -highest) * (1 / highest))  # a hidden logit lies far below
        return d_logits, shared


def _where_highest(z: Array, row: Callable[[int], Array]) -> Array:
    return jnp.where(z >= row(EDGE), row(D_PEAK), jnp.zeros_like(z))


def _weights(tile: Tile, kind: Array, z: Array, row: Callable[[int], Array]) -> _Weights:
    """The weights of a tile from its products q . k; `row(R)` is a row spread over the tile."""
    problem = tile.plan.problem

    def masked(z: Array) -> tuple[Array, Array]:
        z, terms = tile.hide(z), row(C1)
        if problem.stats:
            terms += jnp.where(tile.is_first(), row(D_FIRST), jnp.zeros_like(z))
        return z, terms

    z, terms = jax.lax.cond(kind == MASKED, masked, lambda z: (z, row(C1)), capped(problem, z))
    z *= problem.scale * LOG2E
    e = log2_sigmoid(z, tile.refs.bias[tile.head]) if problem.sigmoid else z
    e = e - row(LSE) if problem.stats or not problem.sigmoid else e + tile.refs.bias[tile.head]
    if problem.stats:
        terms -= row(C) * e
    if problem.stats and not problem.sigmoid:
        terms, e = jax.lax.optimization_barrier((terms + _where_highest(z, row), e))  # no register for a logit and its weight
    return _Weights(jnp.exp2(e), terms, z)


def query_gradients(problem: Problem, x: Operands, d_o: Array, rows: Array) -> tuple[Array, Array]:
    """dq [B, T, H, K] and the gradient [H] of the sigmoid's bias.

    Args:
      problem: as in `kernels.forward`.
      x: likewise.
      d_o: [B, T, H, V].
      rows: float32 [B, H, R, T] of `in_units`.
    """
    size, stages, dtype = problem.tiles.block_kv_dq, problem.tiles.stages, x.q.dtype
    plan = Plan(problem, x, BLOCK, size, over="q")
    outputs = {"d_q": jax.ShapeDtypeStruct(x.q.shape, dtype)}
    if problem.sigmoid:
        outputs["shared"] = jax.ShapeDtypeStruct((plan.batch, plan.num_heads, plan.length), jnp.float32)
    d_q, *shared = plan.run(
        lambda refs: _query_body(plan, refs),
        "attention_query_gradients",
        columns=2 * plan.key_dim + plan.value_dim,
        inputs={"d_o": d_o, "rows": rows},
        outputs=outputs,
        scratch={
            "q_tile": gpu.tile((COMPUTE, ROWS, plan.key_dim), dtype, depth=size),
            "d_o_tile": gpu.tile((COMPUTE, ROWS, plan.value_dim), dtype, depth=size),
            "shared_tile": plgpu.SMEM((COMPUTE, ROWS), jnp.float32) if problem.sigmoid else None,
            "staged": gpu.left_factor((COMPUTE, ROWS, size), dtype),
            "keys": gpu.ring(gpu.tile((stages, size, plan.key_dim), dtype, depth=size), readers=COMPUTE),
            "values": gpu.ring(gpu.tile((stages, size, plan.value_dim), dtype, depth=size), readers=COMPUTE),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        },
    )
    return d_q, jnp.sum(shared[0], axis=(0, 2)) if shared else jnp.zeros_like(x.bias)


def _query_body(plan: Plan, refs: Any) -> None:
    b, h, i, wg = plan.where()
    count = plan.count(refs, b, h, i)

    @pl.when(wg == COMPUTE)
    def _load() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy_keys(plan, refs, b, h, i, count)

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _query_rows(plan, refs, b, h, i, wg, count)


def _query_rows(plan: Plan, refs: Any, b: Array, h: Array, i: Array, wg: Array, count: Array) -> None:
    problem, size = plan.problem, plan.blocks["kv"]
    first = i * BLOCK + wg * ROWS
    at, q_tile, d_o_tile = (b, pl.ds(first, ROWS), h), refs.q_tile.at[wg], refs.d_o_tile.at[wg]
    plgpu.copy_gmem_to_smem(refs.q.at[at], q_tile, refs.arrived.at[wg])
    plgpu.copy_gmem_to_smem(refs.d_o.at[at], d_o_tile, refs.arrived.at[wg])
    rows = [gpu.load(refs.rows.at[b, h, r, pl.ds(first, ROWS)], 0) for r in range(refs.rows.shape[2])]
    plgpu.barrier_wait(refs.arrived.at[wg])
    staged = None if refs.staged is None else refs.staged.at[wg]

    def step(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        acc, total = state
        start, kind = plan.entry(refs, b, h, i, n)
        q_tile, d_o_tile = (tile.at[unhoisted(wg, start)] for tile in (refs.q_tile, refs.d_o_tile))
        tile = Tile(plan, refs, b, h, (first, start), (ROWS, size), 0)
        row = lambda r: gpu.rows_to(rows[r], size)
        [key_tile] = refs.keys.read(n)
        [z] = gpu.products((q_tile, key_tile.transpose((1, 0))))
        at_tile = _weights(tile, kind, z, row)
        [value_tile] = refs.values.read(n)
        [d_weights] = gpu.accumulate((at_tile.terms, d_o_tile, value_tile.transpose((1, 0))))
        refs.values.release(n)
        d_logits, shared = at_tile.d_logits(problem, d_weights, row)
        if problem.sigmoid:
            total += jnp.sum(shared, axis=1)
        [acc] = gpu.accumulate((acc, d_logits.astype(refs.k.dtype), key_tile), scratch=staged)
        refs.keys.release(n)
        return acc, total

    acc, total = jax.lax.fori_loop(0, count, step, (gpu.full((ROWS, plan.key_dim), 0.0), gpu.full((ROWS,), 0.0)))
    q_tile[...] = (problem.scale * acc).astype(refs.d_q.dtype)
    if problem.sigmoid:
        refs.shared_tile.at[wg][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, refs.d_q.at[at])
    if problem.sigmoid:
        plgpu.copy_smem_to_gmem(refs.shared_tile.at[wg], refs.shared.at[b, h, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def key_gradients(problem: Problem, x: Operands, d_o: Array, rows: Array) -> tuple[Array, Array]:
    """dk [B, S, Hkv, K] and dv [B, S, Hkv, V], summed over the heads of each group; arguments as in `query_gradients`.

    Where both sums do not fit the registers, two launches make one each.
    """
    if x.q.shape[3] + x.v.shape[3] <= 256:
        d_k, d_v = _key_gradients(problem, x, d_o, rows, ("d_k", "d_v"))
        return d_k, d_v
    [d_k], [d_v] = (_key_gradients(problem, x, d_o, rows, (name,)) for name in ("d_k", "d_v"))
    return d_k, d_v


def _key_gradients(problem: Problem, x: Operands, d_o: Array, rows: Array, wanted: tuple[str, ...]) -> list[Array]:
    size, stages, dtype = problem.tiles.block_q_dkv, problem.tiles.stages, x.q.dtype
    plan = Plan(problem, x, size, BLOCK, over="kv")
    num_rows = rows.shape[2]
    outputs = {name: jax.ShapeDtypeStruct(x.k.shape if name == "d_k" else x.v.shape, dtype) for name in wanted}
    return plan.run(
        lambda refs: _key_body(plan, refs, wanted),
        "attention_key_gradients",
        columns=2 * (plan.key_dim + plan.value_dim),
        inputs={"d_o": d_o, "rows": rows},
        outputs=outputs,
        scratch={
            "k_tile": gpu.tile((COMPUTE, ROWS, plan.key_dim), dtype, depth=size),
            "v_tile": gpu.tile((COMPUTE, ROWS, plan.value_dim), dtype, depth=size),
            "staged": gpu.left_factor((COMPUTE, ROWS, size), dtype),
            "visited": gpu.ring(
                gpu.tile((stages, size, plan.key_dim), dtype, depth=size),
                gpu.tile((stages, size, plan.value_dim), dtype, depth=size),
                plgpu.SMEM((stages, num_rows, size), jnp.float32),
                readers=COMPUTE,
            ),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        },
    )


def _key_body(plan: Plan, refs: Any, wanted: tuple[str, ...]) -> None:
    b, h, j, wg = plan.where()

    @pl.when(wg == COMPUTE)
    def _load() -> None:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        _copy_queries(plan, refs, b, h, j)

    @pl.when(wg < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _key_rows(plan, refs, b, h, j, wg, wanted)


def _over_members(plan: Plan, refs: Any, b: Array, h: Array, j: Array, visit: Any, state: Any) -> tuple[Array, Any]:
    """Folds state = visit(n, head, step, state) over the tiles of all heads of a group, n counting from 0 across them.

    Returns the number of tiles and the last state.
    """

    def member(m: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        base, state = carry
        head = h * plan.group + m
        count = plan.count(refs, b, head, j)
        return base + count, jax.lax.fori_loop(0, count, lambda s, state: visit(base + s, head, s, state), state)

    return jax.lax.fori_loop(0, plan.group, member, (jnp.int32(0), state))


def _copy_queries(plan: Plan, refs: Any, b: Array, h: Array, j: Array) -> None:
    size = plan.blocks["q"]

    def copy(n: Array, head: Array, step: Array, _: None) -> None:
        start, _kind = plan.entry(refs, b, head, j, step)
        tokens = pl.ds(start, size)
        refs.visited.fill(n, refs.q.at[b, tokens, head], refs.d_o.at[b, tokens, head], refs.rows.at[b, head, :, tokens])

    count, _ = _over_members(plan, refs, b, h, j, copy, None)
    refs.visited.drain(count)


def _key_rows(plan: Plan, refs: Any, b: Array, h: Array, j: Array, wg: Array, wanted: tuple[str, ...]) -> None:
    """dk and dv, or one of them, of the 64 keys of one warpgroup; tiles are keys by queries."""
    problem, size, dtype = plan.problem, plan.blocks["q"], refs.q.dtype
    first = j * BLOCK + wg * ROWS
    at, k_tile, v_tile = (b, pl.ds(first, ROWS), h), refs.k_tile.at[wg], refs.v_tile.at[wg]
    plgpu.copy_gmem_to_smem(refs.k.at[at], k_tile, refs.arrived.at[wg])
    plgpu.copy_gmem_to_smem(refs.v.at[at], v_tile, refs.arrived.at[wg])
    plgpu.barrier_wait(refs.arrived.at[wg])
    staged = None if refs.staged is None else refs.staged.at[wg]

    def visit(n: Array, head: Array, step: Array, accs: list[Array]) -> list[Array]:
        start, kind = plan.entry(refs, b, head, j, step)
        k_tile, v_tile = (tile.at[unhoisted(wg, start)] for tile in (refs.k_tile, refs.v_tile))
        tile = Tile(plan, refs, b, head, (start, first), (ROWS, size), 1)
        q_tile, d_o_tile, rows = refs.visited.read(n)

        def row(r: int) -> Array:
            return gpu.columns_to(gpu.load(rows.at[r], 1), ROWS)

        sums = dict(zip(wanted, accs, strict=True))
        [z] = gpu.products((k_tile, q_tile.transpose((1, 0))))
        at_tile = _weights(tile, kind, z, row)
        terms = []
        if "d_v" in sums:
            terms.append((sums["d_v"], at_tile.weights.astype(dtype), d_o_tile))
        if "d_k" in sums:
            terms.append((at_tile.terms, v_tile, d_o_tile.transpose((1, 0))))
        done = gpu.accumulate(*terms, scratch=staged)
        if "d_v" in sums:
            sums["d_v"] = done[0]
        if "d_k" in sums:
            d_logits, _ = at_tile.d_logits(problem, done[-1], row)
            [sums["d_k"]] = gpu.accumulate((sums["d_k"], d_logits.astype(dtype), q_tile), scratch=staged)
        refs.visited.release(n)
        return [sums[name] for name in wanted]

    widths = {"d_k": plan.key_dim, "d_v": plan.value_dim}
    _, accs = _over_members(plan, refs, b, h, j, visit, [gpu.full((ROWS, widths[name]), 0.0) for name in wanted])
    done = dict(zip(wanted, accs, strict=True))
    for name, acc in done.items():
        target = k_tile if name == "d_k" else v_tile
        target[...] = (acc * problem.scale if name == "d_k" else acc).astype(dtype)
    plgpu.commit_smem()
    for name in done:
        plgpu.copy_smem_to_gmem(k_tile if name == "d_k" else v_tile, getattr(refs, name).at[at])
    plgpu.wait_smem_to_gmem(0)

"""What the GPU kernels (Mosaic GPU, for Hopper) share: when they can run, tiles in shared memory, and matrix products on them.

The products have two forms with the same numbers. Compiled, `wgmma` takes its left factor and its accumulator from registers; the
interpreter runs neither, so there the left factor goes through shared memory and a fresh product is added.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.chips import CHIPS
from plait.kernels.target import Outdated, current, not_on

Array = jax.Array

MIN_JAX = (0, 11, 2)
"""The first release with the kernel interface used here."""

GENERATIONS = tuple(name for name, chip in CHIPS.items() if chip.wgmma)
"""Targets with `wgmma`."""

MAX_SMEM = 227 << 10
"""Bytes of shared memory a block can have."""

_interpreting: contextvars.ContextVar[Any] = contextvars.ContextVar("plait_gpu_interpret", default=None)


def unavailable() -> str | None:
    """Why no GPU kernel of ours can be traced here, or None."""
    if reason := not_on("gpu"):
        return reason
    here = current()
    if here is not None and here.generation not in GENERATIONS:
        return f"the target is {here.generation}, and wgmma exists on {' and '.join(GENERATIONS)} only"
    if jax.__version_info__ < MIN_JAX:
        needed = ".".join(map(str, MIN_JAX))
        return Outdated(f"it needs JAX >= {needed} and this is {jax.__version__}; install plait[cuda] with Python 3.12 or newer")
    return None


@contextlib.contextmanager
def interpreting(*, detect_races: bool = True) -> Iterator[None]:
    """Kernels traced here run in Pallas' GPU interpreter on the CPU; a data race raises an error.

    A warpgroup that waits holds one of XLA's threads: with fewer of these than warpgroups and one, as on two cores, large tiles
    hang. Set NPROC=8, or XLA_FLAGS=--xla_force_host_platform_device_count=8, before JAX starts.
    """
    token = _interpreting.set(plgpu.InterpretGPUParams(detect_races=detect_races))  # type: ignore[attr-defined]
    try:
        yield
    except Exception:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # a failed kernel leaves its buffers behind

        gpu_callbacks.reset_gpu_interpret_mode_state()
        raise
    finally:
        _interpreting.reset(token)


def interpreted() -> bool:
    """Whether kernels traced here are interpreted."""
    return _interpreting.get() is not None


def call(
    body: Callable[..., None], *, name: str, sums_columns: bool = True, cost: pl.CostEstimate | None = None, **options: Any
) -> Callable[..., Any]:
    """`plgpu.kernel` with fast exponentials and explicit layouts; interpreted under `interpreting`. `options` are its own.

    `sums_columns` is whether a reduction runs down the columns of a matrix, or to one number, and so over warps, which takes 2 KiB of
    shared memory.
    `cost` is told where JAX can (0.12).
    """
    body.__name__ = name
    params = plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=2 << 10 if sums_columns else 0,
    )
    if interpreted():
        options["interpret"] = _interpreting.get()
    if cost is not None and "cost_estimate" in inspect.signature(plgpu.kernel).parameters:
        options["cost_estimate"] = cost
    return plgpu.kernel(body, compiler_params=params, **options)


def tile(shape: Sequence[int], dtype: Any, *, depth: int = 64) -> Any:
    """An uninitialised tile [..., M, N] in shared memory, laid out as `wgmma` and the copies want it.

    Both tiles of a product need the same swizzle, which depends on N and on `depth`: the least M over which a product with this
    tile, or with a tile that meets it, sums.

    Raises:
      ValueError: N or `depth` is no multiple of the smallest swizzle (32 bytes).
    """
    for swizzle in (128, 64, 32):
        columns = swizzle // jnp.dtype(dtype).itemsize
        if shape[-1] % columns == 0 and depth % columns == 0:
            return plgpu.SMEM(
                tuple(shape), dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
            )
    raise ValueError(
        f"tile: the last of shape={tuple(shape)} and depth={depth} must be multiples of {columns}; pad the last axis"
    )


def left_factor(shape: Sequence[int], dtype: Any) -> Any:
    """Scratch through which `accumulate` passes a left factor that lives in registers; None where none is needed."""
    return tile(shape, dtype) if interpreted() else None


class Ring(NamedTuple):
    """Tiles in shared memory that one warpgroup fills and others read, some steps ahead of them."""

    tiles: tuple[Any, ...]
    """Each [stages, ...]; filled and read together."""
    filled: Any
    """A barrier a stage, on which the readers wait."""
    free: Any
    """A barrier a stage, on which every reader arrives when it is done."""

    def fill(self, step: Array, *sources: Any) -> None:
        """Starts the copies of a reader's step, one source a tile."""
        slot = self.slot(step)
        pl.when(step >= self.tiles[0].shape[0])(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for tile, source in zip(self.tiles, sources, strict=True):
            plgpu.copy_gmem_to_smem(source, tile.at[slot], self.filled.at[slot])

    def drain(self, steps: Array) -> None:
        """Waits until all of a number of steps, not waited for by later fills, are released; ends the filling."""
        for back in range(self.tiles[0].shape[0], 0, -1):
            last = steps - back
            pl.when(last >= 0)(partial(plgpu.barrier_wait, self.free.at[self.slot(last)]))

    def read(self, step: Array) -> list[Any]:
        """The tiles of a step, once they are there; to be followed by `release`."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.filled.at[slot])
        return [tile.at[slot] for tile in self.tiles]

    def release(self, step: Array) -> None:
        """Says that this reader has read a step's tiles."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def slot(self, step: Array) -> Array:
        """The place of a step's tiles in the ring."""
        return jax.lax.rem(step, jnp.int32(self.tiles[0].shape[0]))


def ring(*tiles: Any, readers: int) -> Ring:
    """Scratch of a `Ring` of tiles [stages, ...] for a number of reading warpgroups."""
    stages = tiles[0].shape[0]
    return Ring(
        tiles,
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
        plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def full(shape: Sequence[int], value: float, dtype: Any = jnp.float32) -> Array:
    """A constant [M, N] in the layout of products, or [M] in that of their rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def load(ref: Any, axis: int) -> Array:
    """A vector from shared or global memory, in the layout of what each row (`axis` 0) or column (1) of a product has one of."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)  # type: ignore[call-arg]


def rows_to(x: Array, num_columns: int) -> Array:
    """[M] to [M, N]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], num_columns), (0,))


def columns_to(x: Array, num_rows: int) -> Array:
    """[N] to [M, N]."""
    return jax.lax.broadcast_in_dim(x, (num_rows, x.shape[0]), (1,))


def products(*pairs: tuple[Any, Any], issued: Callable[[], None] | None = None) -> list[Array]:
    """The products a b, float32, of pairs of tiles in shared memory, a [M, K] and b [K, N], waited for together.

    `issued` is called between their start and the wait.
    """

    def multiply(*accs: Any) -> list[Array]:
        for acc, (a, b) in zip(accs, pairs, strict=True):
            plgpu.wgmma(acc, a, b)
        if issued is not None:
            issued()
        return [acc[...] for acc in accs]

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def accumulate(*terms: tuple[Array, Any, Any], scratch: Any = None) -> list[Array]:
    """acc + a b of (acc, a, b), waited for together: acc float32 [M, N] in registers, a [M, K] there or in shared memory, b there.

    `scratch` is what `left_factor` gave; only an a in registers needs it.
    """
    if not interpreted():

        def add(accs: Any) -> None:
            for acc, (_, a, b) in zip(accs, terms, strict=True):
                plgpu.wgmma(acc, a, b)

        return list(pl.run_state(add)([plgpu.ACC.init(acc) for acc, _, _ in terms]))
    return [acc + products((_staged(a, scratch), b))[0] for acc, a, b in terms]


def _staged(a: Any, scratch: Any) -> Any:
    """A left factor in shared memory."""
    if not isinstance(a, jax.Array):
        return a
    scratch[...] = a
    plgpu.commit_smem()
    return scratch

"""Rows of an array in global memory by number, on Hopper: gathered into a tile in shared memory, and added to.

Copies of TMA gather from Blackwell on only, and one of a single row has no place in a swizzled tile, so these are instructions of threads:
`cp.async`, 16 bytes each, whose addresses follow the swizzle, and `red` of the sums that a product left in registers. The interpreter
runs neither; its callers gather before the kernel, and add after it.
"""

from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from plait.kernels.gpu import tile

Array = jax.Array

DEPTH = 32
"""Columns of 16 bits in a row of the swizzle that these tiles have, that of 64 bytes: `gpu.tile` gives it with this `depth`."""

_THREADS, _ROW_BYTES, _CHUNK = 128, 64, 16
_LANES = _ROW_BYTES // _CHUNK
_PASS = _THREADS // _LANES
"""Rows that a warpgroup copies at a time."""


def gather(tile_ref: Any, source: Any, rows: Any) -> None:
    """Starts the copies of rows of `source` into a tile, as one group of copies of each thread; a row of -1 gives zeros.

    Args:
      tile_ref: [N, K] of 16-bit numbers in shared memory, with the swizzle of `DEPTH`; K and N are multiples of 32.
      source: [S, K] in global memory.
      rows: int32 [N] in global memory.
    """
    transforms = tile(tile_ref.shape, tile_ref.dtype, depth=DEPTH).transforms

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()))
    def copy(_: Any, tile_ref: Any, source: Any, rows: Any) -> None:
        i8, i32, i64 = (ir.IntegerType.get_signless(n) for n in (8, 32, 64))
        const = lambda value: utils.c(value, i32)
        row_tiles, column_tiles, _, columns = ir.MemRefType(tile_ref.type).shape
        element, width = ir.MemRefType(source.type).element_type, column_tiles * columns
        thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
        thread = arith.andi(thread, const(_THREADS - 1))
        chunk, first = arith.andi(thread, const(_LANES - 1)), arith.shrui(thread, const(2))
        inner = arith.andi(first, const(7))
        # The swizzle of 64 bytes turns the place of 16 bytes in their row by bits 7 and 8 of the address.
        turned = arith.xori(chunk, arith.andi(arith.shrui(inner, const(1)), const(3)))
        offset = arith.addi(arith.muli(inner, const(_ROW_BYTES)), arith.shli(turned, const(4)))
        to, origin, numbers = (utils.memref_ptr(x) for x in (tile_ref, source, rows))
        origin = llvm.addrspacecast(llvm.PointerType.get(address_space=1), origin)
        for start in range(0, row_tiles * 8, _PASS):
            index = arith.addi(first, const(start))
            row = llvm.load(i32, utils.getelementptr(numbers, [index], i32))
            seen = arith.cmpi(arith.CmpIPredicate.sge, row, const(0))
            size = arith.select(seen, const(_CHUNK), const(0))
            at = arith.muli(arith.extsi(i64, arith.select(seen, row, const(0))), utils.c(width, i64))
            at = arith.addi(at, arith.extsi(i64, arith.muli(chunk, const(_CHUNK // 2))))
            begin = utils.getelementptr(origin, [at], element)
            block = arith.muli(arith.shrui(index, const(3)), const(column_tiles * 8 * _ROW_BYTES))
            end = utils.getelementptr(to, [arith.addi(block, offset)], i8)
            for c in range(column_tiles):
                nvvm.cp_async_shared_global(
                    utils.getelementptr(end, [c * 8 * _ROW_BYTES], i8),
                    utils.getelementptr(begin, [c * columns], element),
                    _CHUNK,
                    nvvm.LoadCacheModifierKind.CG,
                    cp_size=size,
                )
        nvvm.cp_async_commit_group()

    copy(tile_ref, source, rows)


def wait(groups: int) -> None:
    """Waits until all but the last `groups` gathers of this thread are there, for it to see; `commit_smem` shows them to products."""

    @plgpu.inline_mgpu()
    def awaited(_: Any) -> None:
        nvvm.cp_async_wait_group(groups)

    awaited()


def add(target: Any, values: Array, rows: Array) -> None:
    """Adds the columns of `values` to rows of `target`, number by number, in no order; a row of -1 gets nothing.

    Args:
      target: float32 [S, M] in global memory.
      values: float32 [M, N], a product.
      rows: int32 [N], in the layout of what each column of a product has one of.
    """
    numbers = jax.lax.broadcast_in_dim(rows, values.shape, (1,))
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def reduce(_: Any, target: Any, values: Any, numbers: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        kind = ir.MemRefType(target.type)
        strides, _ = kind.get_strides_and_offset()
        origin = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(target))
        stride = utils.c(strides[0], i64)
        indices = values.layout.thread_idxs(values.shape)
        for (channel, _key), value, number in zip(indices, values.registers.flat, numbers.registers.flat, strict=True):
            for i in range(2):
                lane = utils.c(i, i32)
                row = llvm.extractelement(number, lane)
                at = arith.addi(arith.muli(arith.extsi(i64, row), stride), arith.index_cast(i64, channel))
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [utils.getelementptr(origin, [at], kind.element_type), row, llvm.extractelement(value, lane)],
                    "{ .reg .pred p; setp.ge.s32 p, $1, 0; @p red.relaxed.gpu.global.add.f32 [$0], $2; }",
                    "l,r,f",
                    has_side_effects=True,
                )

    reduce(target, values, numbers)

"""The instructions that gather rows and add to them on GPUs, which no interpreter runs: the code that emits them, on plain numbers.

Modules that make instructions are exchanged for ones that compute, one thread after the other, on arrays in place of memory.
"""

import operator
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import gpu
from plait.kernels.attention.gpu import rows as by_row

pytestmark = pytest.mark.newest

BYTES = {"i8": 1, "i32": 4, "i64": 8, "f32": 4, "bf16": 2}


class Pointer(NamedTuple):
    """A byte of an array."""

    memory: np.ndarray
    byte: int

    def of(self, count: int) -> np.ndarray:
        """The bytes from here on."""
        assert 0 <= self.byte <= self.memory.nbytes - count
        return self.memory.reshape(-1).view(np.uint8)[self.byte : self.byte + count]


class Thread:
    """The modules as one thread sees them."""

    def __init__(self, number: int):
        self.arith = SimpleNamespace(
            andi=operator.and_,
            xori=operator.xor,
            addi=operator.add,
            muli=operator.mul,
            shli=operator.lshift,
            shrui=operator.rshift,
            index_cast=lambda kind, x: x,
            extsi=lambda kind, x: x,
            select=lambda which, a, b: a if which else b,
            cmpi=lambda predicate, a, b: predicate(a, b),
            CmpIPredicate=SimpleNamespace(sge=operator.ge),
        )
        self.gpu = SimpleNamespace(thread_id=lambda dimension: number, Dimension=SimpleNamespace(x=0))
        self.utils = SimpleNamespace(
            c=lambda value, kind: value, memref_ptr=lambda x: Pointer(x.array, x.byte), getelementptr=_moved
        )
        self.ir = SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
            MemRefType=lambda kind: kind,
            Type=SimpleNamespace(parse=str),
        )
        self.llvm = SimpleNamespace(
            PointerType=SimpleNamespace(get=lambda address_space: address_space),
            addrspacecast=lambda kind, pointer: pointer,
            load=lambda kind, pointer: int(pointer.of(BYTES[kind]).view(np.int32)[0]),
            extractelement=lambda vector, lane: vector[lane],
            inline_asm=_added,
        )
        self.nvvm = SimpleNamespace(
            cp_async_shared_global=_copied,
            cp_async_commit_group=lambda: None,
            LoadCacheModifierKind=SimpleNamespace(CG=None),
        )


def _moved(pointer: Pointer, indices: list[int], kind: str) -> Pointer:
    return Pointer(pointer.memory, pointer.byte + indices[0] * BYTES[kind])


def _copied(to: Pointer, source: Pointer, count: int, _: Any, *, cp_size: int) -> None:
    to.of(count)[:] = 0
    to.of(cp_size)[:] = source.of(cp_size)


def _added(_: Any, operands: list[Any], text: str, constraints: str, **__: Any) -> None:
    assert "setp.ge.s32 p, $1, 0; @p red.relaxed.gpu.global.add.f32 [$0], $2;" in text
    assert constraints == "l,r,f"
    target, row, value = operands
    if row >= 0:
        target.of(4).view(np.float32)[:] += np.float32(value)


class Memory:
    """An array as a reference to memory of a shape, from some byte of it on."""

    def __init__(self, array: np.ndarray, shape: tuple[int, ...], element: str, byte: int = 0, strides: Any = None):
        self.array, self.byte = array, byte
        self.type = SimpleNamespace(shape=shape, element_type=element, get_strides_and_offset=lambda: (strides, 0))


def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The threads of a warpgroup, each in its turn."""
    for number in range(128):
        for name, module in vars(Thread(number)).items():
            monkeypatch.setattr(by_row, name, module)
        yield number


def _emitting(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """Functions inlined are called with these."""
    inlined = lambda **_: lambda function: lambda *__: function(None, *arguments)
    monkeypatch.setattr(by_row.plgpu, "inline_mgpu", inlined)
    monkeypatch.setattr(by_row.plgpu, "RefType", lambda *_: None)


@pytest.mark.parametrize(("num_rows", "width"), [(64, 576), (32, 64), (64, 128)])
def test_gathered_rows_lie_as_products_read_them(num_rows: int, width: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 1 << 16, (300, width)).astype(np.uint16)
    numbers = rng.integers(-1, 300, num_rows).astype(np.int32)
    numbers[::7] = -1
    shared = np.full(num_rows * width, 7, np.uint16)
    tile = Memory(shared, (num_rows // 8, width // 32, 8, 32), "bf16")
    _emitting(monkeypatch, tile, Memory(source, source.shape, "bf16"), Memory(numbers, numbers.shape, "i32"))
    given = gpu.tile((num_rows, width), jnp.bfloat16, depth=by_row.DEPTH)
    assert [t.swizzle for t in given.transforms if hasattr(t, "swizzle")] == [2 * by_row.DEPTH]
    for _ in _threads(monkeypatch):
        by_row.gather(SimpleNamespace(shape=(num_rows, width), dtype=jnp.bfloat16), None, None)
    address = 2 * np.arange(shared.size)
    swizzled = address ^ (((address >> 7) & 3) << 4)  # CUDA's swizzle of 64 bytes
    tiles = shared[swizzled // 2].reshape(num_rows // 8, width // 32, 8, 32)
    np.testing.assert_array_equal(
        tiles.swapaxes(1, 2).reshape(num_rows, width), np.where(numbers[:, None] >= 0, source[numbers], 0)
    )


def test_products_are_added_to_their_rows(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 9, (64, 32)).astype(np.float32)
    numbers = rng.permutation(50)[:32].astype(np.int32)
    numbers[::5] = -1
    start = rng.integers(-9, 9, (50, 192)).astype(np.float32)
    target = start.copy()
    for thread in _threads(monkeypatch):  # 8 x 8 numbers of a product to a warp, two of a row to a thread
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        places = [(row + 8 * i, column + 8 * j) for j in range(4) for i in range(2)]
        pair = (_held(x, places) for x in (values, np.broadcast_to(numbers, (64, 32))))
        _emitting(monkeypatch, Memory(target, (50, 64), "f32", byte=64 * 4, strides=(192, 1)), *pair)
        by_row.add(None, jnp.zeros((64, 32)), jnp.zeros(32, jnp.int32))
    expected = start.copy()
    seen = numbers >= 0
    expected[numbers[seen], 64:128] += values.T[seen]
    np.testing.assert_array_equal(target, expected)


def _held(x: np.ndarray, places: list[tuple[int, int]]) -> SimpleNamespace:
    """What a thread holds of a product: at each place a number and the one after it."""
    layout = SimpleNamespace(thread_idxs=lambda shape: iter(places))
    registers = SimpleNamespace(flat=[x[row, column : column + 2].tolist() for row, column in places])
    return SimpleNamespace(shape=x.shape, layout=layout, registers=registers)

"""Float32 sums of keys, such as their gradients, that a TPU kernel adds to while it goes through the tiles that queries have to do with.

Those of a tile come from memory and go back at each visit. Where so few queries visit it that this would take longer than their work, sums of
all keys of a head lie on the core, if it has room for them twice: those of the head before leave meanwhile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu.tiling import LANES, rounded_up

Array = jax.Array

SLOTS = 3
"""Visits whose sums are on the core: one that comes, one that is added to, and one on its way back."""

FEW = 512
"""Queries, of all heads of a tile, that are too few for the sums to come and go."""

RESERVE = 24 << 20
"""Bytes of the core's memory for a kernel's other arrays, of which XLA's own may need as many."""


class Place(NamedTuple):
    """Where a tile of keys is: scalars."""

    row: Array
    head: Array
    tile: Array
    real: Array
    """Whether it is one: a list ends with others."""


class KeySums(Protocol):
    """The sums as a step of the grid sees them."""

    def begin(self) -> None:
        """Ahead of the step's visits, of which there may be none."""

    def enter(self, n: Array) -> None:
        """Ahead of what visit n adds; ahead of the first also with -1."""

    def add(self, n: Array, p: int, x: Array) -> None:
        """Adds to the p-th tile of visit n."""

    def leave(self, n: Array) -> None:
        """Behind what visit n adds."""

    def end(self) -> None:
        """Behind the step's visits."""


class Moving(NamedTuple):
    """Sums [B, H, tiles, ...] that lie in memory."""

    far: Any
    slots: Any
    """[SLOTS, tiles of a visit, ...]"""
    arrived: Any
    left: Any
    place: Callable[[Array, int], Place]
    visits: Array
    """How many there are."""

    @staticmethod
    def scratch(tile: tuple[int, ...], together: int) -> list[Any]:
        """The memory from `slots` on."""
        return [pltpu.VMEM((SLOTS, together, *tile), jnp.float32), *[pltpu.SemaphoreType.DMA((SLOTS, together))] * 2]

    def begin(self) -> None: ...

    def enter(self, n: Array) -> None:
        earlier = n - (SLOTS - 1)  # those of a slot are back before others come to it
        pl.when(earlier >= 0)(partial(self._each, earlier, _wait, back=True))
        pl.when(n + 1 < self.visits)(partial(self._each, n + 1, _start, back=False))
        pl.when(n >= 0)(partial(self._each, n, _wait, back=False))

    def add(self, n: Array, p: int, x: Array) -> None:
        self.slots[jax.lax.rem(n, SLOTS), p] += x

    def leave(self, n: Array) -> None:
        self._each(n, _start, back=True)

    def end(self) -> None:
        for last in (self.visits - n for n in range(1, SLOTS)):
            pl.when(last >= 0)(partial(self._each, last, _wait, back=True))

    def _each(self, n: Array, move: Callable[[Any], None], *, back: bool) -> None:
        """Moves the sums of a visit to this core, or back."""
        slot = jax.lax.rem(jnp.maximum(n, 0), SLOTS)
        for p in range(self.slots.shape[1]):
            at = self.place(n, p)

            def moved(p: int = p, at: Place = at) -> None:
                ends = self.far.at[at.row, at.head, at.tile], self.slots.at[slot, p]
                semaphore = (self.left if back else self.arrived).at[slot, p]
                move(pltpu.make_async_copy(*(ends[::-1] if back else ends), semaphore))

            pl.when(at.real)(moved)


class Resident(NamedTuple):
    """Sums [B, H, tiles, ...] of which those of a head lie on the core. The grid is rows, heads and the steps of a head."""

    far: Any
    slots: Any
    """[2, tiles, ...]"""
    left: Any
    place: Callable[[Array, int], Place]
    overlap: bool
    """A head's sums leave while those of the next are made: where one core has the whole grid, in order."""

    @staticmethod
    def scratch(tiles: int, tile: tuple[int, ...]) -> list[Any]:
        """The memory from `slots` on."""
        return [pltpu.VMEM((2, tiles, *tile), jnp.float32), pltpu.SemaphoreType.DMA((2,))]

    def begin(self) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _clear():
            slot, number = self._slot(), self._number()
            pl.when(self.overlap & (number >= 2))(lambda: self._copy(number - 2).wait())

            def clear(tile: Array, _: None) -> None:
                self.slots[slot, tile] = jnp.zeros(self.slots.shape[2:], jnp.float32)

            jax.lax.fori_loop(0, self.slots.shape[1], clear, None)

    def enter(self, n: Array) -> None: ...

    def add(self, n: Array, p: int, x: Array) -> None:
        self.slots[self._slot(), self.place(n, p).tile] += x

    def leave(self, n: Array) -> None: ...

    def end(self) -> None:
        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _leave():
            number = self._number()
            self._copy(number).start()
            final = number == pl.num_programs(0) * pl.num_programs(1) - 1
            pl.when(self.overlap & final & (number >= 1))(lambda: self._copy(number - 1).wait())
            pl.when(final | (not self.overlap))(lambda: self._copy(number).wait())

    def _number(self) -> Array:
        """Of the head, among those of all rows."""
        return pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    def _slot(self) -> Array:
        return jax.lax.rem(self._number(), 2)

    def _copy(self, number: Array) -> Any:
        heads, slot = pl.num_programs(1), jax.lax.rem(number, 2)
        to = self.far.at[jax.lax.div(number, heads), jax.lax.rem(number, heads)]
        return pltpu.make_async_copy(self.slots.at[slot], to, self.left.at[slot])


def resident_bytes(num_queries: int, tiles: int, tile: Sequence[int], memory: int) -> int:
    """What a kernel with `Resident` takes of a core's memory, where sums of these tiles had better lie there and can; else 0."""
    *rows, last = tile
    needed = 2 * 4 * tiles * prod(rows) * rounded_up(last, LANES) + RESERVE
    return needed if num_queries <= FEW and needed <= memory * 7 // 8 else 0


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()

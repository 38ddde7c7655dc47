"""Float32 sums of queries that lie in memory while a kernel goes through the keys, and on the core while a tile adds to them.

Those of the next tile come while one is worked on, and those of the last one leave meanwhile. The last few stay on the core too: tiles of a
window soon come back to the same queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

SLOTS = 3
"""Blocks that are on the core: the one that is added to, the one before, and one that comes."""

_CURRENT, _PREVIOUS, _NEXT, _COMES, _OF_SLOTS = range(5)
"""What the state says: the slots of this step's block, of the block before and of the next one, whether that comes from memory, and of each
slot its head, its block, and whether that is on its way back."""


class Place(NamedTuple):
    """Where the queries of a step are: scalars."""

    head: Array
    block: Array
    adds: Array
    """Whether the step adds anything."""


def scratch(width: int, block_q: int) -> list[Any]:
    """The memory of `Carried`: blocks, semaphores of those that come and that leave, and the state."""
    return [
        pltpu.VMEM((SLOTS, width, block_q), jnp.float32),
        *[pltpu.SemaphoreType.DMA((SLOTS,))] * 2,
        pltpu.SMEM((_OF_SLOTS + 3 * SLOTS,), jnp.int32),
    ]


class Carried:
    """The sums as a step sees them, between `enter` and `leave`.

    Args:
      far: the sums of a row of the batch [H, width, T].
      blocks, arrived, left, state: see `scratch`.
      place: of the n-th step.
      n: this step.
      count: how many steps there are.
    """

    def __init__(
        self,
        far: Any,
        blocks: Any,
        arrived: Any,
        left: Any,
        state: Any,
        *,
        place: Callable[[Array], Place],
        n: Array,
        count: Array | int,
    ):
        self.far, self.blocks, self.arrived, self.left, self.state = far, blocks, arrived, left, state
        before, self.place, self.after = (place(jnp.clip(m, 0, count - 1)) for m in (n - 1, n, n + 1))
        self.first, self.final = n == 0, n == count - 1
        self.begins = self.place.adds & (self.first | ~_same(before, self.place))
        self.ends = self.place.adds & (self.final | ~_same(self.place, self.after))
        self.goes_on = self.after.adds & ~self.final & ~_same(self.place, self.after)

    @property
    def here(self) -> Any:
        """Reference to the sums of the tile [width, block_q]."""
        return self.blocks.at[self.state[_CURRENT]]

    def enter(self) -> None:
        """Has the sums of this step on the core, and sends for those of the next."""
        state = self.state

        @pl.when(self.first)
        def _start():
            for i, x in enumerate((0, 1, 0, 0, *(-1, 0, 0) * SLOTS)):
                state[i] = x
            pl.when(self.begins)(partial(self._send_for, self.place))

        @pl.when(self.begins)
        def _turn():
            state[_PREVIOUS] = jnp.where(state[_NEXT] == state[_CURRENT], state[_PREVIOUS], state[_CURRENT])
            state[_CURRENT] = state[_NEXT]

        slot, comes = state[_CURRENT], state[_COMES]
        pl.when(self.goes_on)(partial(self._send_for, self.after))
        pl.when(self.begins & (comes == 1))(lambda: self._copy(slot, back=False).wait())
        pl.when(self.begins & (comes == 0))(partial(self._settle, slot))

    def leave(self) -> None:
        """Sends the sums back, unless the next step adds to them too; after the last step all are back."""

        @pl.when(self.ends)
        def _send():
            slot = self.state[_CURRENT]
            self._copy(slot, back=True).start()
            self.state[_OF_SLOTS + 3 * slot + 2] = 1

        @pl.when(self.final)
        def _settle():
            for slot in range(SLOTS):
                self._settle(slot)

    def _send_for(self, place: Place) -> None:
        """Finds a block on the core or has it come, in the slot that was left longest ago."""
        state = self.state
        oldest = sum(range(SLOTS)) - state[_CURRENT] - state[_PREVIOUS]
        slot = oldest
        for i in range(SLOTS):
            head, block = (state[_OF_SLOTS + 3 * i + j] for j in range(2))
            slot = jnp.where((head == place.head) & (block == place.block), i, slot)
        at = _OF_SLOTS + 3 * slot
        comes = (state[at] != place.head) | (state[at + 1] != place.block)
        state[_NEXT], state[_COMES] = slot, comes.astype(jnp.int32)

        @pl.when(comes)
        def _fetch():
            self._settle(slot)
            state[at], state[at + 1] = place.head, place.block
            self._copy(slot, back=False).start()

    def _settle(self, slot: Any) -> None:
        """Waits until what is in a slot is in memory too."""
        at = _OF_SLOTS + 3 * slot + 2

        @pl.when(self.state[at] == 1)
        def _wait():
            self._copy(slot, back=True).wait()
            self.state[at] = 0

    def _copy(self, slot: Any, *, back: bool) -> Any:
        """The copy of a slot's block to the core, or back."""
        head, block = (self.state[_OF_SLOTS + 3 * slot + i] for i in range(2))
        size = self.blocks.shape[2]
        ends = self.far.at[head, :, pl.ds(block * size, size)], self.blocks.at[slot]
        return pltpu.make_async_copy(*(ends[::-1] if back else ends), (self.left if back else self.arrived).at[slot])


def _same(a: Place, b: Place) -> Array:
    """Two steps in a row add to the same sums."""
    return (a.head == b.head) & (a.block == b.block) & a.adds & b.adds

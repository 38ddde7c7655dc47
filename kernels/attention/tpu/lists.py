"""Which tiles a step of the grid visits, where queries select blocks: a list in scalar memory, and in which memory each lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from plait.kernels.attention.visits import FULL, SKIP, ordered

Array = jax.Array


class TileList(NamedTuple):
    """The list of one step, as a kernel reads it."""

    ref: Any
    """[1, 1, 1, 1, .]: how many tiles, how many visits of the head before, and of each tile 4 * tile + kind."""
    step: Array
    """Its number among those of a head."""
    fetched: int
    """Tiles a visit."""

    @staticmethod
    def table(kinds: Array, fetched: int) -> Array:
        """The lists of tiles of kinds [B, heads, steps, tiles], as they lie in scalar memory [B, heads, steps, 1, .]."""
        visits = ordered(kinds, kinds.shape[-1], late=FULL).entries
        counts = jnp.sum((visits & 3) != SKIP, axis=-1, dtype=jnp.int32)
        num_visits = -(-counts // fetched)
        before = jnp.cumsum(num_visits, axis=-1) - num_visits
        table = jnp.concatenate([counts[..., None], before[..., None], visits], axis=-1)[..., None, :]
        return jnp.pad(table, [(0, 0)] * 4 + [(0, fetched - 1)])  # of kind SKIP

    @property
    def visits(self) -> Array:
        """How many there are."""
        return pl.cdiv(_listed(self.ref, 0), self.fetched)

    def slot(self, n: Array) -> Array:
        """Where what visit n fetches lies: those of a head take turns."""
        return (_listed(self.ref, 1) + n) & 1

    def entry(self, n: Array, p: int) -> Array:
        """The p-th tile of visit n, 4 * tile + kind."""
        return _listed(self.ref, 2 + n * self.fetched + p)


def _listed(ref: Any, n: Any) -> Array:
    """A number of the list of a step."""
    return ref[0, 0, 0, 0, n]

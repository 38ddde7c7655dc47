"""The call of a memory that learns while it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import chunking
from plait.kernels.call import OPTION, Call, letters
from plait.kernels.online_memory.rule import Rule, Weights
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


class MemoryState(NamedTuple):
    """What a memory has learned, float32; tuples have one `[B, H, I, O]` a layer."""

    accumulated: Weights
    momentum: Weights
    """Empty without momentum."""
    opened: Weights
    """What was accumulated at the start of the open chunk."""
    chunk: Array
    """int32 `[B]`: the number in its document of the open chunk; -1 before the first token."""


class Borders(NamedTuple):
    """Where chunks begin, `[B, T]` bool each but the last."""

    real: Array
    opens: Array
    """The token is the first of its chunk."""
    restarts: Array
    """It is the first of its document."""
    last: Array
    """int32 `[B]`: the number of the last token's chunk."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MemoryCall(Call):
    """One call of `plait.kernels.online_memory`."""

    results: ClassVar[tuple[str, ...]] = ("bthv", "bhio", "bhio", "bhio", "b", "bth")

    q: Array = field(metadata=letters("bthk"))
    k: Array = field(metadata=letters("bthk"))
    v: Array = field(metadata=letters("bthk"))
    g: Array = field(metadata=letters("bthk"))
    step: Array = field(metadata=letters("bthk"))
    momentum: Any = field(metadata=letters("bth"))
    threshold: Any = field(metadata=letters("bth"))
    initial: Weights = field(metadata=letters("hio"))
    segment_ids: Array = field(metadata=letters("bt"))
    positions: Array = field(metadata=letters("bt"))
    accumulated: Weights = field(metadata=letters("bhio"))
    speed: Weights = field(metadata=letters("bhio"))
    opened: Weights = field(metadata=letters("bhio"))
    chunk: Array = field(metadata=letters("b"))
    rule: Rule = field(metadata=OPTION)

    @property
    def dtype(self) -> Any:
        """That of sums and states."""
        return accumulation_dtype(self.q)

    @property
    def borders(self) -> Borders:
        """Where chunks begin."""
        return borders(self.segment_ids, self.positions, self.chunk, self.rule.chunk_size)

    def wide(self) -> tuple[Array, ...]:
        """q, k, v, g, step, momentum and threshold, head-major in the dtype of sums: `[B, H, T, K or 1]`, `[B, H, T]`; None as given."""

        def turn(x: Any) -> Any:
            return None if x is None else jnp.moveaxis(x, 2, 1).astype(self.dtype)

        return tuple(map(turn, (self.q, self.k, self.v, self.g, self.step, self.momentum, self.threshold)))

    def fresh(self) -> Weights:
        """The learned memory that a document begins with, `[1, H, I, O]` a layer."""
        return tuple(w.astype(self.dtype)[None] for w in self.initial)


def borders(segment_ids: Array, positions: Array, chunk: Array, chunk_size: int) -> Borders:
    """Where chunks of the documents begin; padding belongs to none. `chunk` is the number of the one that is open, as in the state."""
    index, real = chunking.segment_index(segment_ids)
    number = positions // chunk_size
    here = jnp.arange(real.shape[1], dtype=jnp.int32)[None, :]
    last = jax.lax.cummax(jnp.where(real, here, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    at = lambda x, place: jnp.take_along_axis(x, jnp.maximum(place, 0), axis=1)
    old = jnp.where(before >= 0, at(number, before), chunk[:, None])
    other = (before >= 0) & (at(index, before) != index)
    first = (before < 0) & (chunk < 0)[:, None]
    end = jnp.where(last[:, -1:] >= 0, at(number, last[:, -1:]), chunk[:, None])[:, 0]
    return Borders(real, real & (other | (number != old)), real & (other | first), end)

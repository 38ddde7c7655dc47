"""In which order layers meet the rows of a batch: all rows at once, unless the trainer sets another schedule."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

Rows = Mapping[str, jax.Array]
"""What layers know of each row beside the residual stream, batch first."""
Layers = Callable[[jax.Array, Rows, Any], tuple[jax.Array, Any]]
"""`(x [B, ...], rows, parameters) -> (x, outputs)`."""


class Schedule(Protocol):
    """Runs layers over a batch; each row gets the same result under any schedule."""

    def repeat(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        """`layers` once for each entry of the leading axis of `params`, one after the other; outputs stacked on such an axis."""

    def once(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        """`layers` once."""


class AllRows:
    """Every layer takes the whole batch."""

    def repeat(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(lambda x, one: layers(x, rows, one), x, params)

    def once(self, layers: Layers, x: jax.Array, rows: Rows, params: Any) -> tuple[jax.Array, Any]:
        return layers(x, rows, params)


ALL_ROWS = AllRows()
_schedule: contextvars.ContextVar[Schedule] = contextvars.ContextVar("plait_schedule", default=ALL_ROWS)


def schedule() -> Schedule:
    """The schedule of training and scoring passes."""
    return _schedule.get()


@contextlib.contextmanager
def scheduling(schedule: Schedule) -> Iterator[None]:
    """Training and scoring passes traced inside the block run by `schedule`."""
    token = _schedule.set(schedule)
    try:
        yield
    finally:
        _schedule.reset(token)

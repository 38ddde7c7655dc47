"""Work that each device does by itself for its part of the arrays.

Most of a model says what to compute and leaves to the compiler how devices share it. Where that goes badly (sorting tokens by expert,
sending them to where the experts are), a layer says what one device does. Outside a mesh one device does it all.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from plait.models.axes import Axes

Over = Callable[[str], tuple[str, ...]]
"""Logical axis to the mesh axes over which its entries are divided: empty for one that each device has whole."""


class Divide(Protocol):
    """Runs `function(over, *arrays)` on every device."""

    def __call__(self, function: Callable[..., Any], arrays: tuple[jax.Array, ...], names: tuple[Axes, ...], results: Any) -> Any:
        """See `divided`."""


_divide: contextvars.ContextVar[Divide | None] = contextvars.ContextVar("plait_divide", default=None)


@contextlib.contextmanager
def dividing(divide: Divide) -> Iterator[None]:
    """What is `divided` inside the block is run by `divide` (the trainer passes the mesh's)."""
    token = _divide.set(divide)
    try:
        yield
    finally:
        _divide.reset(token)


def divided(
    function: Callable[..., Any], arrays: tuple[jax.Array, ...], names: tuple[Axes, ...], results: tuple[Axes, ...]
) -> Any:
    """The arrays that `function(over, *arrays)` returns, each device giving its part of them for its part of `arrays`.

    Args:
        names: the logical axes of each array, one name or None per dimension.
        results: those of what is returned. What `over` does not divide must be the same on all devices: the function sums it.
    """
    divide = _divide.get()
    return function(lambda name: (), *arrays) if divide is None else divide(function, arrays, names, results)

"""How the rows of a batch flow through the layers: all at once, unless the trainer has them follow one another."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from plait.kernels import Tokens
from plait.kernels.target import on_cpu
from plait.models.stream import Stream

Layers = Callable[[Stream, Tokens, Any], tuple[Stream, Any]]
"""`(stream, at, parameters) -> (stream, outputs)`; all arrays of stream and `at` are batch first."""


FEW = 4
"""Turns that a CPU, which copies what a loop keeps of each for the backward pass, takes one after the other without a loop."""


class Flow(Protocol):
    """Runs layers over a batch; each row gets the same result under any flow."""

    def repeat(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        """`layers` once for each entry of the leading axis of `params`, one after the other; outputs stacked on such an axis."""

    def once(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        """`layers` once."""


class WholeBatch:
    """Every layer takes the whole batch."""

    def repeat(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        unroll = on_cpu() and len(jax.tree.leaves(params)[0]) <= FEW
        return jax.lax.scan(lambda stream, one: layers(stream, at, one), stream, params, unroll=unroll)

    def once(self, layers: Layers, stream: Stream, at: Tokens, params: Any) -> tuple[Stream, Any]:
        return layers(stream, at, params)


WHOLE_BATCH = WholeBatch()
_flow: contextvars.ContextVar[Flow] = contextvars.ContextVar("plait_flow", default=WHOLE_BATCH)


def flow() -> Flow:
    """The flow of training and scoring passes."""
    return _flow.get()


@contextlib.contextmanager
def flowing(flow: Flow) -> Iterator[None]:
    """Training and scoring passes traced inside the block run by `flow`."""
    token = _flow.set(flow)
    try:
        yield
    finally:
        _flow.reset(token)

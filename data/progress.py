"""Who wants to hear how far the reading of text has come: a supervisor that must tell slow from stuck, a line that shows the speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Listener = Callable[[int, int], None]
"""Told how many tokens have been made since the last time, and of how many bytes of text."""

_listeners: list[Listener] = []


@contextlib.contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Inside, `listener` is told of all progress in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def advance(num_tokens: int, num_bytes: int) -> None:
    """Something has got on: so many tokens, of so many bytes."""
    for listener in _listeners:
        listener(num_tokens, num_bytes)

"""Times calls beside one another: they take turns, so that a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Quartiles(NamedTuple):
    """Seconds of a call: the lower quartile, the median and the upper one."""

    low: float
    middle: float
    high: float


def timed(calls: Mapping[str, Callable[[], Any]], repeats: int, *, least: float = 0.02) -> dict[str, Quartiles | Exception]:
    """Seconds of each call, by name, or what it raised.

    Args:
      calls: each returns when its work is done.
      repeats: turns.
      least: seconds of a turn; a shorter call is repeated within it.
    """
    number: dict[str, int] = {}
    found: dict[str, Quartiles | Exception] = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = error
            continue
        start = time.perf_counter()
        call()
        number[name] = max(1, int(least / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in number}
    for _ in range(repeats):
        for name, count in number.items():
            start = time.perf_counter()
            for _ in range(count):
                calls[name]()
            seconds[name].append((time.perf_counter() - start) / count)
    for name, taken in seconds.items():
        found[name] = Quartiles(*(statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3))
    return {name: found[name] for name in calls}

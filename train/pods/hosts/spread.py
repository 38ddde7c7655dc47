"""How evenly the hosts work: what each did while it did not wait for the devices.

A synchronous step takes the same time on every host, so a slow host does not show in it. It shows in the time a host keeps the others
waiting: its own time, in which it reads its batch, dispatches the step and takes in metrics.
"""

from __future__ import annotations

import json

from plait.configs.files import parse_json
from plait.train.clock import Lap
from plait.train.pods.hosts import together


class Spread:
    """Collects the hosts' laps at host 0 without making any host wait: what is reported at one log step was told at the one before."""

    def __init__(self) -> None:
        self._told: int | None = None

    def report(self, step: int, lap: Lap) -> dict[str, float]:
        """On host 0 the metrics of the lap before this one; tells it of this one. Empty with one host."""
        if together.count() == 1:
            return {}
        before, self._told = self._told, step
        together.post(f"lap/{step}", json.dumps([lap.data, lap.own]))
        if not together.first() or before is None:
            return {}
        laps = {host: parse_json(text) for host, text in together.collect(f"lap/{before}").items()}
        if not laps:
            return {}
        slowest = max(laps, key=lambda host: laps[host][1])
        return {
            "time/data_max": max(data for data, _ in laps.values()),
            "time/host_max": laps[slowest][1],
            "time/host_mean": sum(own for _, own in laps.values()) / len(laps),
            "time/slowest_host": float(slowest),
        }

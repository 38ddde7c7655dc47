"""The least time that a step can take: operations, memory traffic and exchange between devices, each at its peak."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from plait.kernels.chips import Chip
from plait.train.pods.plan.compiled.hlo import Collective
from plait.train.pods.plan.compiled.schedule import Schedule
from plait.train.pods.plan.topology import Target

ASSUMPTIONS = (
    "bfloat16 products at the data sheet's peak; norms, softmax and gates cost nothing beside them",
    "memory traffic is what each operation of the compiled program reads and writes, at the data sheet's bandwidth; what stays in a "
    "TPU's VMEM is free, what a GPU's cache would save is not counted",
    "a collective moves (n-1)/n of its array, an all-reduce twice that; over a TPU torus along each dimension that its devices span, "
    "both ways where the dimension closes to a ring; over several hosts or slices the network and the links inside run at once",
    "the bound overlaps the three fully; the time without overlap adds them up",
    "the time as scheduled goes through the program in the compiler's order: operations take the cycles that the TPU compiler estimates, "
    "kernels those that it estimates for each alone, with all tiles of attention visible and queries that choose blocks alike; "
    "what has no estimate, and all on a GPU, is at the peak; exchange that nothing stands beside is waited for",
)
"""Under every time."""


@dataclasses.dataclass(frozen=True)
class Route:
    """How the devices along some mesh axes are joined. Bandwidths in bytes a second into one device."""

    inner: int
    """Devices joined by ICI or NVLink."""
    outer: int
    """Groups of them, joined by the network."""
    link: float
    """Inside a group."""
    network: float
    """Between groups, of one device."""
    hop: float
    """One link, which a permutation uses."""

    def seconds(self, kind: str, size: float) -> float:
        """Of a collective over `size` bytes of full arrays."""
        if kind == "collective-permute":
            return size / (self.network if self.outer > 1 else self.hop)
        factor = 2.0 if kind == "all-reduce" else 1.0
        inside = factor * size * (self.inner - 1) / self.inner / self.link
        across = factor * size * (self.outer - 1) / self.outer / (self.network * self.inner)
        return max(inside, across)

    def describe(self) -> str:
        inside = f"{self.inner} at {self.link / 1e9:.0f} GB/s" if self.inner > 1 else ""
        outside = f"{self.outer} over the network at {self.network * self.inner / 1e9:.3g} GB/s" if self.outer > 1 else ""
        return " x ".join(part for part in (inside, outside) if part)


def route(mesh: jax.sharding.Mesh, axes: Sequence[str], target: Target) -> Route:
    """The way between the devices of a group along `axes`."""
    chip = target.chip
    assert chip is not None
    names = list(mesh.shape)
    index: Any = tuple(slice(None) if name in axes else 0 for name in names)
    devices = np.asarray(mesh.devices[index]).reshape(-1)
    if chip.platform == "gpu":
        hosts = len({device.process_index for device in devices})
        return Route(len(devices) // hosts, hosts, chip.link, chip.network, chip.link)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    return Route(len(devices) // slices, slices, _torus(devices, chip, target), chip.network, chip.link / chip.devices_per_chip)


def _torus(devices: np.ndarray, chip: Chip, target: Target) -> float:
    """Bandwidth into one device from the chips that a group spans in each dimension."""
    at = np.array([device.coords for device in devices])
    total = 0.0
    for dimension in range(at.shape[1]):
        span = len(set(at[:, dimension]))
        if span > 1:
            whole = dimension < len(target.shape) and span == target.shape[dimension]
            total += chip.link * (2 if whole and target.wraps(dimension) else 1)
    return (total or chip.link * 2) / chip.devices_per_chip  # two devices of one chip: taken as fast as two links


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step."""

    compute: float
    memory: float
    exchange: float
    model_flops: float
    """Of one device, for MFU."""
    peak: float
    schedule: Schedule | None
    """The compiled program in the compiler's order; None without one."""

    @property
    def bound(self) -> float:
        """With everything overlapped."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def serial(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.memory + self.exchange

    @property
    def scheduled(self) -> float | None:
        """As the compiler orders and estimates the program; at least its operations at the peak, of which a kernel may not tell."""
        return None if self.schedule is None else max(self.schedule.seconds, self.compute)

    @property
    def limited_by(self) -> str:
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at the bound."""
        return self.mfu_in(self.bound)

    def mfu_in(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes these seconds."""
        return self.model_flops / self.peak / seconds if seconds else math.nan


def times(
    chip: Chip, *, hardware_flops: float, model_flops: float, traffic: float, exchange: float, schedule: Schedule | None = None
) -> Times:
    """Args: operations and bytes of memory traffic of one device, seconds of its collectives, and the compiled schedule."""
    return Times(hardware_flops / chip.flops, traffic / chip.memory_bandwidth, exchange, model_flops, chip.flops, schedule)


def exchange_seconds(found: Sequence[Collective], mesh: jax.sharding.Mesh, target: Target) -> list[float]:
    """Of each collective, one after the other."""
    routes = {axes: route(mesh, axes, target) for axes in {c.axes for c in found}}
    return [routes[c.axes].seconds(c.kind, c.bytes) for c in found]

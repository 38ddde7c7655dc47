"""What is known of each accelerator: its names, and what one JAX device of it can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a generation; hashable, so that it can be a static argument. Bandwidths in bytes a second, one way."""

    generation: str
    platform: Literal["tpu", "gpu"]
    kinds: tuple[str, ...]
    """What JAX's device kind begins with; the first is its usual name."""
    flops: float
    """Dense bfloat16 operations a second."""
    memory: float
    """Bytes that a program may use."""
    memory_bandwidth: float
    link: float
    """TPU: of one ICI link, of which a chip has one each way along a dimension; GPU: of NVLink to all GPUs of its host together."""
    network: float
    """Out of the host or slice, this device's share."""
    devices_per_chip: int = 1
    clock: float = 0.0
    """Cycles a second of a TPU's cores, inferred from the peak."""
    cores: int = 1
    """Of a device, which share its work."""
    vector_memory: int = 0
    """Bytes of the memory of one of a TPU's cores."""
    matrix_unit: int = 128
    """Rows and columns of a TPU's matrix unit."""
    wgmma: bool = False
    """Whether a GPU has Hopper's products of a warpgroup."""
    source: str
    """Where the numbers are from."""


_XLA = "the memory limit is the compiler's own"
_JAX = "memory is the 75% of the board that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)"
_CHIPS = (
    Chip(
        generation="v4", platform="tpu", kinds=("TPU v4",), clock=1.05e9, cores=2, vector_memory=16 << 20,
        flops=275e12, memory=30.75 * GIB, memory_bandwidth=1228e9, link=50e9, network=6.25e9,
        source=f"Cloud TPU v4 page (275 TFLOP/s, 1228 GB/s, 2400 Gb/s of ICI over 6 links); DCN as v5p's; {_XLA}",
    ),
    Chip(
        generation="v5e", platform="tpu", kinds=("TPU v5 lite", "TPU v5e"), clock=1.5e9, vector_memory=128 << 20,
        flops=197e12, memory=15.75 * GIB, memory_bandwidth=819e9, link=50e9, network=3.125e9,
        source=f"Cloud TPU v5e page (197 TFLOP/s, 819 GB/s, 1600 Gb/s of ICI over 4 links, 6.4 Tb/s of DCN a pod of 256); {_XLA}",
    ),
    Chip(
        generation="v5p", platform="tpu", kinds=("TPU v5", "TPU v5p"), clock=1.75e9, cores=2, vector_memory=64 << 20,
        flops=459e12, memory=95.74 * GIB, memory_bandwidth=2765e9, link=100e9, network=6.25e9,
        source=f"Cloud TPU v5p page (459 TFLOP/s, 2765 GB/s, 1200 GB/s of ICI both ways over 6 links, 50 Gb/s of DCN a chip); {_XLA}",
    ),
    Chip(
        generation="v6e", platform="tpu", kinds=("TPU v6 lite", "TPU v6e"), clock=1.75e9, vector_memory=128 << 20, matrix_unit=256,
        flops=918e12, memory=31.25 * GIB, memory_bandwidth=1638e9, link=100e9, network=12.5e9,
        source=f"Cloud TPU v6e page (918 TFLOP/s, 1638 GB/s, 3200 Gb/s of ICI over 4 links, 25.6 Tb/s of DCN a pod of 256); {_XLA}",
    ),
    Chip(
        generation="tpu7x", platform="tpu", kinds=("TPU7x",), devices_per_chip=2, clock=2.2e9, vector_memory=64 << 20, matrix_unit=256,
        flops=1153e12, memory=94.75 * GIB, memory_bandwidth=3690e9, link=100e9, network=6.25e9,
        source=f"Cloud TPU7x page (two devices: 2307 TFLOP/s, 7380 GB/s, 1200 GB/s of ICI both ways, 6 links); DCN as v6e's; {_XLA}",
    ),
    Chip(
        generation="h100", platform="gpu", kinds=("NVIDIA H100",), wgmma=True,
        flops=989e12, memory=0.75 * 79.6 * GIB, memory_bandwidth=3350e9, link=450e9, network=50e9,
        source=f"H100 SXM data sheet (989 TFLOP/s, 3350 GB/s, NVLink 900 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
    Chip(
        generation="h200", platform="gpu", kinds=("NVIDIA H200",), wgmma=True,
        flops=989e12, memory=0.75 * 140.4 * GIB, memory_bandwidth=4800e9, link=450e9, network=50e9,
        source=f"H200 SXM data sheet (989 TFLOP/s, 4800 GB/s, NVLink 900 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
    Chip(
        generation="b200", platform="gpu", kinds=("NVIDIA B200",),
        flops=2250e12, memory=0.75 * 179.0 * GIB, memory_bandwidth=8000e9, link=900e9, network=50e9,
        source=f"DGX B200 data sheet (2250 TFLOP/s, 8000 GB/s, NVLink 1800 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
)  # fmt: skip
CHIPS = {chip.generation: chip for chip in _CHIPS}
"""What kernels, plans and launch files can be made for, by generation."""

_BY_KIND = {kind: chip for chip in _CHIPS for kind in chip.kinds}
_PEAKS = {kind: chip.flops for kind, chip in _BY_KIND.items()} | {"NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12}
"""Also of devices that are run on but not planned for, by their data sheets."""


def chip_of(kind: str) -> Chip | None:
    """The chip with a device kind of JAX, None where it is not known (CPUs)."""
    return _BY_KIND.get(_longest(kind, _BY_KIND))


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 operations a second of a JAX device, None where it is not known (CPUs)."""
    return _PEAKS.get(_longest(device.device_kind, _PEAKS))


def _longest(kind: str, known: Iterable[str]) -> str:
    return max((name for name in known if kind.startswith(name)), key=len, default="")

"""What the accelerators can do, per JAX device: the numbers under every time that a plan states."""

from __future__ import annotations

import dataclasses
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a generation. Bandwidths in bytes a second, one way."""

    platform: Literal["tpu", "gpu"]
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
    source: str
    """Where the numbers are from."""


_XLA = "the memory limit is the compiler's own"
_JAX = "memory is the 75% of the board that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)"
CHIPS = {
    "v4": Chip(
        platform="tpu", flops=275e12, memory=30.75 * GIB, memory_bandwidth=1228e9, link=50e9, network=6.25e9,
        source=f"Cloud TPU v4 page (275 TFLOP/s, 1228 GB/s, 2400 Gb/s of ICI over 6 links); DCN as v5p's; {_XLA}",
    ),
    "v5e": Chip(
        platform="tpu", flops=197e12, memory=15.75 * GIB, memory_bandwidth=819e9, link=50e9, network=3.125e9,
        source=f"Cloud TPU v5e page (197 TFLOP/s, 819 GB/s, 1600 Gb/s of ICI over 4 links, 6.4 Tb/s of DCN a pod of 256); {_XLA}",
    ),
    "v5p": Chip(
        platform="tpu", flops=459e12, memory=95.74 * GIB, memory_bandwidth=2765e9, link=100e9, network=6.25e9,
        source=f"Cloud TPU v5p page (459 TFLOP/s, 2765 GB/s, 1200 GB/s of ICI both ways over 6 links, 50 Gb/s of DCN a chip); {_XLA}",
    ),
    "v6e": Chip(
        platform="tpu", flops=918e12, memory=31.25 * GIB, memory_bandwidth=1638e9, link=100e9, network=12.5e9,
        source=f"Cloud TPU v6e page (918 TFLOP/s, 1638 GB/s, 3200 Gb/s of ICI over 4 links, 25.6 Tb/s of DCN a pod of 256); {_XLA}",
    ),
    "tpu7x": Chip(
        platform="tpu", flops=1153e12, memory=94.75 * GIB, memory_bandwidth=3690e9, link=100e9, network=6.25e9, devices_per_chip=2,
        source=f"Cloud TPU7x page (two devices: 2307 TFLOP/s, 7380 GB/s, 1200 GB/s of ICI both ways, 6 links); DCN as v6e's; {_XLA}",
    ),
    "h100": Chip(
        platform="gpu", flops=989e12, memory=0.75 * 79.6 * GIB, memory_bandwidth=3350e9, link=450e9, network=50e9,
        source=f"H100 SXM data sheet (989 TFLOP/s, 3350 GB/s, NVLink 900 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
    "h200": Chip(
        platform="gpu", flops=989e12, memory=0.75 * 140.4 * GIB, memory_bandwidth=4800e9, link=450e9, network=50e9,
        source=f"H200 SXM data sheet (989 TFLOP/s, 4800 GB/s, NVLink 900 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
    "b200": Chip(
        platform="gpu", flops=2250e12, memory=0.75 * 179.0 * GIB, memory_bandwidth=8000e9, link=900e9, network=50e9,
        source=f"DGX B200 data sheet (2250 TFLOP/s, 8000 GB/s, NVLink 1800 GB/s both ways), 400 Gb/s of InfiniBand a GPU; {_JAX}",
    ),
}  # fmt: skip
"""By the name of the generation, as in `plait.kernels.target.TARGETS`."""

_DESCRIPTION = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
  platform_name: "CUDA" runtime_version {{ major: 13 }} device_description_str: "{name}" """
_HOPPER = {"cores": 132, "cache": 52_428_800, "clock": 1.98, "major": 9}

GPU_DESCRIPTIONS = {
    "h100": _DESCRIPTION.format(bandwidth=3_350_000_000_000, memory=80_000_000_000, name="NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": _DESCRIPTION.format(bandwidth=4_800_000_000_000, memory=141_000_000_000, name="NVIDIA H200", **_HOPPER),
    "b200": _DESCRIPTION.format(
        bandwidth=8_000_000_000_000,
        memory=180_000_000_000,
        name="NVIDIA B200",
        cores=148,
        cache=132_644_864,
        clock=1.965,
        major=10,
    ),
}
"""The text that XLA would read from a GPU, for ahead-of-time compiles."""

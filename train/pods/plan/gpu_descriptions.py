"""The text that XLA would read from a GPU, for ahead-of-time compiles."""

from plait.kernels.chips import CHIPS

_DESCRIPTION = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
  platform_name: "CUDA" runtime_version {{ major: 13 }} device_description_str: "{name}" """
_HOPPER = {"cores": 132, "cache": 52_428_800, "clock": 1.98, "major": 9}
_FACTS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", **_HOPPER, "memory": 80_000_000_000},
    "h200": {"name": "NVIDIA H200", **_HOPPER, "memory": 141_000_000_000},
    "b200": {"name": "NVIDIA B200", "memory": 180_000_000_000, "cores": 148, "cache": 132_644_864, "clock": 1.965, "major": 10},
}

GPU_DESCRIPTIONS = {
    name: _DESCRIPTION.format(bandwidth=round(CHIPS[name].memory_bandwidth), **facts) for name, facts in _FACTS.items()
}
"""By generation."""

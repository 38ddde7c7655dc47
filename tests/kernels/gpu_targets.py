"""Descriptions of GPUs for ahead-of-time compiles: the text that XLA would read from the device."""

_TEMPLATE = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
  platform_name: "CUDA" runtime_version {{ major: 13 }} device_description_str: "{name}" """

TARGETS = {
    "h100": _TEMPLATE.format(bandwidth=3_350_000_000_000, memory=80_000_000_000, name="NVIDIA H100 80GB HBM3"),
    "h200": _TEMPLATE.format(bandwidth=4_800_000_000_000, memory=141_000_000_000, name="NVIDIA H200"),
}
"""By the name of the target."""

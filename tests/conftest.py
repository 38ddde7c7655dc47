"""Test-wide settings: CPU, eight host devices, rank promotion an error, highest matmul precision."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time compiling: LLVM's optimisations cost more of it than they save.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

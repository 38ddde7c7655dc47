"""Test-wide settings: CPU, eight host devices, rank promotion an error, highest matmul precision, and what shares a worker."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time compiling: LLVM's optimisations cost more of it than they save.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that share compiled programs stay on one worker: those of an `xdist_group`, else those of a file."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))

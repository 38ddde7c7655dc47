"""Test-wide settings: CPU, eight host devices, rank promotion an error, highest matmul precision, and what shares a worker."""

import gc
import importlib.metadata
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time compiling: LLVM's optimisations cost more of it than they save, and XLA's newer emitters of fused loops, which
# later versions cannot do without, two fifths of it; cutting a program for several threads, an eighth, where workers have the cores.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from who started them
    _cache = tempfile.TemporaryDirectory(prefix="plait-cache-")  # programs of commands that tests start, which share them
    os.environ["XDG_CACHE_HOME"] = _cache.name

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
gc.set_threshold(200_000, 50, 1000)  # tracing leaves much that lives on, through which each collection goes: a tenth of the time


_MOST_MAPS = 30_000
"""Memory maps of a process at which compiled programs, of which each has several, are given up: Linux allows 65,530."""


def give_up_programs() -> None:
    """Forgets compiled programs where they are many: a worker must not run out of memory maps, which ends it without a word."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def bounded_programs():
    """Each module leaves room for the next one's programs."""
    yield
    give_up_programs()


@pytest.fixture(scope="module")
def give_up():
    """`give_up_programs`, for modules that compile for many cases."""
    return give_up_programs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share compiled programs stay on one worker: those of a file, or of one case where the file names cases in `BY_CASE`."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharedPrograms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(nodeid)

    return BySharedPrograms(config, log)


BY_CASE = (
    "tests/models/mixers/test_contract.py",
    "tests/kernels/test_attention_tpu.py",
    "tests/kernels/test_attention_tpu_selected.py",
)


def shared_by(nodeid: str) -> str:
    """What names the tests that go to one worker: `file`, or `file[case]` with the dtype and the kind of sigmaReparam left out."""
    file, _, test = nodeid.partition("::")
    case = re.sub(r"(-(float32|bfloat16|spectral|one))+$", "", test.partition("[")[2].rstrip("]"))
    return f"{file}[{case}]" if file in BY_CASE else file

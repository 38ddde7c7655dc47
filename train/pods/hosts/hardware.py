"""What the devices can do and where the run ran."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PEAK_TFLOPS = {  # dense bf16, per JAX device, from the makers' data sheets
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 1153,
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "libtpu", "plait")


def peak_flops(device: Any) -> float | None:
    """Peak bf16 FLOP/s of a device, None where it is not known (CPUs)."""
    known = [name for name in _PEAK_TFLOPS if device.device_kind.startswith(name)]
    return _PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers hang on, where they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions, devices, host and commit, for `environment.json`."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "processes": jax.process_count(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this source tree, None where it is installed without one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

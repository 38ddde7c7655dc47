"""Where a run ran: packages, devices, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "libtpu", "plait")


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
    return (_git("describe", "--always", "--dirty") or "").strip() or None


def changes() -> str:
    """What differs from that commit, as `git diff` writes it; empty where nothing does."""
    return _git("diff", "HEAD", "--no-color", "--no-ext-diff") or ""


def _git(*words: str) -> str | None:
    """What git says of this source tree; None where there is none, or no git."""
    root = str(Path(__file__).parents[3])
    try:
        done = subprocess.run(
            ["git", "-C", root, *words], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

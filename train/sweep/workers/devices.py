"""The devices of this machine, shared out between workers before any of them looks at one. Needs no JAX.

NVIDIA GPUs   CUDA_VISIBLE_DEVICES: as many for each worker
TPU chips     TPU_VISIBLE_CHIPS, with TPU_CHIPS_PER_PROCESS_BOUNDS and TPU_PROCESS_BOUNDS: one for each worker
CPU           the cores that a worker's process may run on, by which XLA makes its threads
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.configs.domains import choices, divisors

_DEV = Path("/dev")


@dataclasses.dataclass(frozen=True)
class Share:
    """What one worker gets."""

    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: frozenset[int] | None = None
    """Those it may run on; None for all."""


def shares(workers: int) -> list[Share]:
    """A share for each worker; one alone gets all there is.

    Raises:
        ValueError: the devices cannot be shared out so.
    """
    if workers == 1:
        return [Share()]
    platform = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if platform in ("", "cuda", "gpu") and (gpus := _gpus()):
        if len(gpus) % workers:
            raise ValueError(
                f"workers={workers} must divide the {len(gpus)} GPUs here; use one of {choices(divisors(len(gpus)))}"
            )
        each = len(gpus) // workers
        return [Share({"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}) for i in range(workers)]
    if platform in ("", "tpu") and (chips := _chips()):
        if len(chips) != workers:
            raise ValueError(f"workers={workers} must be 1, with all TPU chips, or {len(chips)}, with one each")
        alone = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return [Share({"TPU_VISIBLE_CHIPS": chip, **alone}) for chip in chips]
    if not hasattr(os, "sched_getaffinity"):
        return [Share()] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [Share(cores=frozenset(cores[i::workers] or [cores[i % len(cores)]])) for i in range(workers)]


def _gpus() -> Sequence[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _numbered(_DEV, r"nvidia([0-9]+)") if given is None else [one for one in given.split(",") if one.strip()]


def _chips() -> Sequence[str]:
    given = os.environ.get("TPU_VISIBLE_CHIPS")
    if given is not None:
        return [one for one in given.split(",") if one.strip()]
    there = _numbered(_DEV, r"accel([0-9]+)") or _numbered(_DEV / "vfio", r"([0-9]+)")
    return [str(index) for index in range(len(there))]


def _numbered(folder: Path, name: str) -> list[str]:
    """The numbers of the files in a folder that are named so, in order."""
    found = [re.fullmatch(name, path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return [str(number) for number in sorted(int(one[1]) for one in found if one)]

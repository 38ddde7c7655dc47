"""Which host this process is and where the hosts meet, from flags, environment, SLURM, Kubernetes or TPU metadata. Needs no JAX."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse
from plait.configs.domains import Counted, Devices, Line, Seconds, Whole, check_leaves

PORT = 8476
"""The coordinator's, unless one is given."""
_METADATA_SECONDS = 5.0


class HostsError(ValueError):
    """Hosts that are not described as they must be, or that disagree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsOptions:
    """Where the hosts of a run meet and how they are watched. No part of the experiment: another number of hosts goes on with a run."""

    coordinator: Line | None = None
    """HOST:PORT of host 0; by default PLAIT_COORDINATOR, else what is detected."""
    count: Devices | None = None
    """Hosts, one training process each; by default PLAIT_HOST_COUNT, else what is detected."""
    index: Annotated[int, Whole(0, 2**20)] | None = None
    """This host's number, from 0; by default PLAIT_HOST_INDEX, else what is detected."""
    local: Annotated[int, Whole(1, 4096)] | None = None
    """Starts this many processes on this machine instead, to try a many-host run on its CPU."""
    detect: Literal["auto", "none", "slurm", "kubernetes", "tpu"] = "auto"
    """What to ask for what is not given."""
    connect_seconds: Seconds = 300.0
    """Longest wait for the other hosts at the start."""
    step_seconds: Seconds = 60.0
    """Longest time without a step before a process counts as hung; at least ten times the slowest step so far."""
    restarts: Counted = 0
    """Restarts, with --resume, of a training process that failed."""

    def __post_init__(self) -> None:
        try:
            check_leaves(self)
        except ValueError as error:
            raise HostsError(f"hosts.{error}") from None
        given = [name for name in ("coordinator", "count", "index") if getattr(self, name) is not None]
        if self.local is not None and given:
            raise HostsError(f"hosts.local={self.local} chooses hosts.{', hosts.'.join(given)} itself; give one or the other")


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the hosts of a run."""

    coordinator: str
    """HOST:PORT of host 0."""
    count: int
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise HostsError(
                f"hosts.index={self.index} must be from 0 to {self.count - 1}, for hosts.count={self.count}; give each host its own"
            )
        if not re.fullmatch(r"(\[.+\]|[^:\s]+):\d+", self.coordinator):
            raise HostsError(f"hosts.coordinator={self.coordinator!r} must be HOST:PORT; use for example 10.0.0.1:{PORT}")


def host_options(args: Sequence[str]) -> tuple[HostsOptions, list[str]]:
    """The `--hosts.*` options among command-line arguments, and the rest. Raises HostsError for values out of range."""
    mine, rest = split_options(HostsOptions, args, "hosts.")
    return parse(HostsOptions, mine, default=HostsOptions(), prefix="hosts.", prog="launch.py train PRESET"), rest


def find_host(options: HostsOptions, environ: Mapping[str, str] | None = None) -> Host | None:
    """This host, None where there is only one.

    Flags go before `PLAIT_*` variables, these before what is detected. Raises HostsError naming what is missing or wrong.
    """
    env = os.environ if environ is None else environ
    found: dict[str, str | int | None] = {
        "coordinator": options.coordinator or env.get("PLAIT_COORDINATOR"),
        "count": options.count if options.count is not None else _number(env, "PLAIT_HOST_COUNT"),
        "index": options.index if options.index is not None else _number(env, "PLAIT_HOST_INDEX"),
    }
    if found["count"] == 1:
        return None
    origin = "flags and PLAIT_ variables"
    if None in found.values():
        detect = env.get("PLAIT_HOSTS", "auto") if options.detect == "auto" else options.detect
        if detect not in ("auto", "none", *_DETECTORS):
            raise HostsError(f"PLAIT_HOSTS={detect!r} must be one of auto, none, {', '.join(_DETECTORS)}; use auto")
        for name, detector in _DETECTORS.items():
            if detect in ("auto", name) and (detected := detector(env, detect == name)) is not None:
                found = {key: detected.get(key) if value is None else value for key, value in found.items()}
                origin = f"{origin}, and {name}"
                break
        else:
            if detect in _DETECTORS:
                raise HostsError(f"hosts.detect={detect} finds nothing here; {_WANTED[detect]}, or give {_FLAGS}")
    count, index, coordinator = found["count"], found["index"], found["coordinator"]
    if count == 1 or all(value is None for value in found.values()):
        return None
    missing = [f"hosts.{name}" for name, value in found.items() if value is None]
    if missing:
        raise HostsError(f"{' and '.join(missing)} must be known for several hosts ({origin} give none); give {_FLAGS}")
    coordinator = str(coordinator)
    return Host(
        coordinator if re.search(r"(?<!:):\d+$", coordinator) else f"{coordinator}:{PORT}", int(count or 0), int(index or 0)
    )


_FLAGS = "--hosts.coordinator HOST:PORT --hosts.count N --hosts.index I, or PLAIT_COORDINATOR, PLAIT_HOST_COUNT, PLAIT_HOST_INDEX"
_Found = dict[str, str | int | None]


def _slurm(env: Mapping[str, str], asked: bool) -> _Found | None:
    """Inside an srun step of several tasks. The batch script itself is no step."""
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= env.keys():
        return None
    count = _number(env, "SLURM_STEP_NUM_TASKS")
    nodes = env["SLURM_STEP_NODELIST"]
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if first is None:
        raise HostsError(f"SLURM_STEP_NODELIST={nodes!r} names no host; give --hosts.coordinator HOST:PORT")
    port = 61440 + int(env["SLURM_JOB_ID"]) % 4096  # two jobs on a node meet at two ports
    return {
        "coordinator": f"{first[1]}{first[2] or ''}:{port}",
        "count": count if count is not None else _number(env, "SLURM_NTASKS"),
        "index": _number(env, "SLURM_PROCID"),
    }


def _kubernetes(env: Mapping[str, str], asked: bool) -> _Found | None:
    """A pod of an Indexed Job, or of a JobSet of several, one a slice."""
    if "JOB_COMPLETION_INDEX" not in env or not (asked or {"PLAIT_HOST_COUNT", "JOBSET_NAME"} & env.keys()):
        return None
    index = _number(env, "JOB_COMPLETION_INDEX") or 0
    if slice_index := _number(env, "JOB_INDEX"):
        per_slice = _number(env, "PLAIT_HOSTS_PER_SLICE")
        if per_slice is None:
            raise HostsError(f"JOB_INDEX={slice_index} needs PLAIT_HOSTS_PER_SLICE, the pods of one replicated job; set it")
        index += slice_index * per_slice
    coordinator = None
    if {"JOBSET_NAME", "REPLICATED_JOB_NAME"} <= env.keys():
        coordinator = f"{env['JOBSET_NAME']}-{env['REPLICATED_JOB_NAME']}-0-0.{env['JOBSET_NAME']}"
    return {"coordinator": coordinator, "count": None, "index": index}


def _tpu(env: Mapping[str, str], asked: bool) -> _Found | None:
    """Workers of a TPU slice: GKE tells them in the environment, a TPU VM through its metadata server; slices through MEGASCALE_*."""
    workers, worker = env.get("TPU_WORKER_HOSTNAMES"), env.get("TPU_WORKER_ID")
    if workers is None or worker is None:
        platforms = env.get("JAX_PLATFORMS", "")
        here = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
        if not asked and (not here or "TPU_SKIP_MDS_QUERY" in env or (platforms and "tpu" not in platforms)):
            return None
        workers, worker = _metadata("worker-network-endpoints", env), _metadata("agent-worker-number", env)
        if workers is None or worker is None:
            return None
    # An entry is a host name, or name:number:address.
    addresses = [entry.split(":")[-1] for entry in workers.split(",")]
    slices, this = _number(env, "MEGASCALE_NUM_SLICES") or 1, _number(env, "MEGASCALE_SLICE_ID") or 0
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", addresses[0]).split(":")[0]
    return {"coordinator": first, "count": slices * len(addresses), "index": this * len(addresses) + int(worker)}


_DETECTORS = {"slurm": _slurm, "kubernetes": _kubernetes, "tpu": _tpu}
_WANTED = {
    "slurm": "start with srun, which sets SLURM_PROCID and SLURM_STEP_NODELIST",
    "kubernetes": "use an Indexed Job, which sets JOB_COMPLETION_INDEX, and set PLAIT_HOST_COUNT",
    "tpu": "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES are not set, and no metadata server tells agent-worker-number",
}


def _metadata(key: str, env: Mapping[str, str]) -> str | None:
    """An attribute of this virtual machine, None where there is no metadata server or no such attribute."""
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError):
        return None


def _number(env: Mapping[str, str], name: str) -> int | None:
    if not env.get(name):
        return None
    try:
        return int(env[name])
    except ValueError:
        raise HostsError(f"{name}={env[name]!r} must be a whole number; set it to one, or not at all") from None

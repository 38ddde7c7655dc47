"""What a launch file starts: a checked experiment, on machines, as one command that every host runs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

import jax

from plait.configs.cli import parse_experiment
from plait.configs.experiment import ExperimentConfig
from plait.train.launch_files.machines import Machines
from plait.train.mesh import batch_sharding, make_mesh
from plait.train.optimizer import make_optimizer
from plait.train.state import Blueprint, state_shardings

COORDINATOR_PORT = 8476
DONE, FAILED, BAD_INPUT, SAVED = 0, 1, 2, 75
"""Exit statuses of `launch.py train`: done; failed, start again; bad input, do not; stopped by SIGTERM and saved, start again."""

_SET_BY_THE_FILE = {
    "--out": "it is the run folder, which the file sets; see --run-folder, --mount and --name",
    "--resume": "the file always resumes",
    "--no-resume": "the file always resumes",
}
_TOKENIZER_ELSEWHERE = 32_768  # stands for a vocabulary that only the hosts can count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run on machines."""

    name: str
    machines: Machines
    preset: str
    overrides: tuple[str, ...]
    """Of the config, as given."""
    written_by: tuple[str, ...]
    """The command that wrote the file, to be pasted."""

    def command(self, entry: str, run_folder: str) -> list[str]:
        """What each host runs, watched by its supervisor; the first start and every restart are the same."""
        alone = ["--hosts.local", "1"] if self.machines.hosts == 1 else []
        return [*shlex.split(entry), "train", self.preset, *self.overrides, "--out", run_folder, "--resume", *alone]


@dataclasses.dataclass(frozen=True)
class _Device:
    """Stands for a device of a host that is not here: what a mesh is laid out over."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "described"


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for options of `train` that a launch file sets itself."""
    for word in overrides:
        flag = word.partition("=")[0]
        if flag in _SET_BY_THE_FILE:
            raise ValueError(f"{flag} cannot be given to a launch file: {_SET_BY_THE_FILE[flag]}")
        if flag.startswith("--hosts.") and flag.partition(".")[2] in ("coordinator", "count", "index", "detect", "local"):
            raise ValueError(f"{flag} cannot be given to a launch file: the hosts are those of --target")


def checked_experiment(preset: str, overrides: Sequence[str], machines: Machines) -> ExperimentConfig:
    """The experiment, checked against the machines as a run on them checks it; nothing is compiled.

    Raises:
        ValueError: bad values, or hosts, devices, mesh, model and batch that do not fit each other.
    """
    check_overrides(overrides)
    config = parse_experiment(preset, _without_hosts(overrides), prog="launch.py write-launch KIND")
    per_host = machines.devices // machines.hosts
    devices = [_Device(i, i // per_host, i // (per_host * machines.hosts_per_slice)) for i in range(machines.devices)]
    try:
        mesh = make_mesh(config.mesh, devices)
        if mesh.size != machines.devices:
            raise ValueError(
                f"mesh.data={config.mesh.data} leaves {machines.devices - mesh.size} of {machines.devices} devices unused; "
                "leave mesh.data=None to fill them"
            )
        rows, hosts = config.data.batch_size, machines.hosts
        if rows % hosts:
            raise ValueError(f"data.batch_size={rows} must be a multiple of the {hosts} hosts; use {-(-rows // hosts) * hosts}")
        batch_sharding(mesh, rows, config.data.seq_len, config.optimizer.accumulate)
        whole = dataclasses.replace(config, model=config.model.with_vocab(_vocabulary(config)))
        with jax.default_device("cpu"):
            blueprint = Blueprint(whole)
            state_shardings(blueprint, make_optimizer(whole.optimizer, whole.steps, blueprint.decay), mesh)
    except ValueError as error:
        raise ValueError(f"{preset} does not fit {machines.describe()}: {error}") from error
    return config


def _vocabulary(config: ExperimentConfig) -> int:
    """Size of the tokenizer, or what stands for one that is on the hosts."""
    if config.data.tokenizer == "bpe":
        return config.data.bpe_vocab_size
    return 257 if config.data.tokenizer == "byte" else config.model.vocab_size or _TOKENIZER_ELSEWHERE


def _without_hosts(overrides: Sequence[str]) -> list[str]:
    """The overrides of the config: without the supervisor's options (`--hosts.NAME VALUE`)."""
    kept, skip = [], False
    for word in overrides:
        if skip:
            skip = False
        elif word.startswith("--hosts."):
            skip = "=" not in word
        else:
            kept.append(word)
    return kept

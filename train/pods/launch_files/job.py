"""What a launch file starts: a checked experiment, on machines, as one command that every host runs."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence

from plait.configs.command_line.cli import parse_experiment
from plait.configs.experiment import ExperimentConfig
from plait.configs.vocabulary import with_vocabulary
from plait.train.mesh import make_mesh
from plait.train.pods.hosts.host import host_options
from plait.train.pods.launch_files.machines import Machines
from plait.train.pods.launch_files.paths import Paths
from plait.train.program import Program

_OWN_FLAGS = {
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
    """Or the name of a sweep."""
    overrides: tuple[str, ...]
    """Of the config, as given."""
    written_by: tuple[str, ...]
    """The command that wrote the file, to be pasted."""
    paths: Paths = ()
    """That it reads."""
    elements: int = 0
    """Hosts that share the runs of a sweep, each by itself; 0 for one run on all machines."""

    def describe(self) -> str:
        """The machines in words."""
        return f"{self.elements} x {self.machines.describe()}" if self.elements else self.machines.describe()

    def command(self, entry: str, run_folder: str) -> list[str]:
        """What each host runs, watched by its supervisor; the first start and every restart are the same."""
        if self.elements:
            return [*shlex.split(entry), "sweep", self.preset, *self.overrides, "--out", run_folder]
        alone = ["--hosts.local", "1"] if self.machines.hosts == 1 else []
        return [*shlex.split(entry), "train", self.preset, *self.overrides, "--out", run_folder, "--resume", *alone]


@dataclasses.dataclass(frozen=True)
class _Device:
    """Stands for a device of a host that is not here: what a mesh is laid out over."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    """Place of its chip in the torus of its slice."""
    core_on_chip: int
    platform: str
    device_kind: str


def _devices(machines: Machines) -> list[_Device]:
    """What stands for the devices of the machines, in the order of their hosts."""
    chip = machines.chip
    if chip.platform == "tpu":
        sizes = [int(size) for size in machines.topology.split("x")]
        places = [(*reversed(place), *[0] * (3 - len(sizes))) for place in itertools.product(*map(range, reversed(sizes)))]
    else:
        places = [(i,) for i in range(machines.hosts_per_slice * machines.chips_per_host)]
    everywhere = itertools.product(range(machines.slices), enumerate(places), range(chip.devices_per_chip))
    return [
        _Device(
            i,
            slice_index * machines.hosts_per_slice + place // machines.chips_per_host,
            slice_index,
            coords,
            core,
            chip.platform,
            chip.kinds[0],
        )
        for i, (slice_index, (place, coords), core) in enumerate(everywhere)
    ]


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for options of `train` that a launch file sets itself."""
    for word in overrides:
        flag = word.partition("=")[0]
        if flag in _OWN_FLAGS:
            raise ValueError(f"{flag} cannot be given to a launch file: {_OWN_FLAGS[flag]}")
        if flag.startswith("--hosts.") and flag.partition(".")[2] in ("coordinator", "count", "index", "detect", "local"):
            raise ValueError(f"{flag} cannot be given to a launch file: the hosts are those of --target")


def checked_experiment(preset: str, overrides: Sequence[str], machines: Machines) -> ExperimentConfig:
    """The experiment, checked against the machines as a run on them checks it; nothing is compiled.

    Raises:
        ValueError: bad values, or devices, mesh, model and batch that do not fit each other.
    """
    check_overrides(overrides)
    config = parse_experiment(preset, host_options(overrides)[1], prog="launch.py write-launch KIND")
    try:
        mesh = make_mesh(config.mesh, _devices(machines))
        if mesh.size != machines.devices:
            raise ValueError(
                f"mesh.data={config.mesh.data} leaves {machines.devices - mesh.size} of {machines.devices} devices unused; "
                "leave mesh.data=None to fill them"
            )
        Program.of(with_vocabulary(config, elsewhere=_TOKENIZER_ELSEWHERE), mesh)
    except ValueError as error:
        raise ValueError(f"{preset} does not fit {machines.describe()}: {error}") from error
    return config

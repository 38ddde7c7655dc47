"""What a target such as `v5e:16x16` is made of: hosts, chips, and the names by which schedulers ask for them.

Sources, Google Cloud's documentation (docs.cloud.google.com): shapes, chips, hosts and machine types of each generation in tpu/docs/v4,
tpu/docs/v5e, tpu/docs/v5p, tpu/docs/v6e and tpu/docs/tpu7x; names of accelerator types and the TensorCores they count in
tpu/docs/types-topologies; software versions in tpu/docs/runtimes; node labels and machine types of node pools in
kubernetes-engine/docs/concepts/plan-tpus; GPU machine types in compute/docs/accelerator-optimized-machines. Devices are JAX's: a chip of
v4 and v5p is one device (both TensorCores together), a chip of TPU7x is two.
"""

from __future__ import annotations

import dataclasses
import math

from plait.kernels.chips import CHIPS, Chip
from plait.train.pods.plan.topology import GPUS_PER_HOST, parse_target

CHIPS_PER_TPU_HOST = 4
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How schedulers know one generation of accelerators."""

    machine_types: dict[str, str]
    """Google Compute Engine's machine type by the value of GKE's accelerator label; the first is the default. `{}` is the chips a host."""
    max_chips: int | None = None
    """Most chips of a slice that is a box, where that is less than a pod; None for rectangles and GPUs."""
    accelerator_type: str | None = None
    """Cloud TPU API's name before the hyphen; None where only GKE has this generation."""
    cores_per_chip: int = 1
    """What the number after the hyphen counts: TensorCores a chip (1 where it counts chips)."""
    runtime_version: str | None = None
    """Software of a TPU VM for JAX."""


GENERATIONS = {
    "v4": Generation(
        machine_types={"tpu-v4-podslice": "ct4p-hightpu-{}t"},
        accelerator_type="v4",
        cores_per_chip=2,
        runtime_version="tpu-ubuntu2204-base",
    ),
    "v5e": Generation(
        machine_types={"tpu-v5-lite-podslice": "ct5lp-hightpu-{}t"},
        accelerator_type="v5litepod",
        runtime_version="v2-alpha-tpuv5-lite",
    ),
    "v5p": Generation(
        machine_types={"tpu-v5p-slice": "ct5p-hightpu-{}t"},
        max_chips=6144,
        accelerator_type="v5p",
        cores_per_chip=2,
        runtime_version="v2-alpha-tpuv5",
    ),
    "v6e": Generation(
        machine_types={"tpu-v6e-slice": "ct6e-standard-{}t"},
        accelerator_type="v6e",
        runtime_version="v2-alpha-tpuv6e",
    ),
    "tpu7x": Generation(
        machine_types={"tpu7x": "tpu7x-standard-{}t"},
    ),
    "h100": Generation(
        machine_types={"nvidia-h100-mega-80gb": "a3-megagpu-8g", "nvidia-h100-80gb": "a3-highgpu-8g"},
    ),
    "h200": Generation(machine_types={"nvidia-h200-141gb": "a3-ultragpu-8g"}),
    "b200": Generation(machine_types={"nvidia-b200": "a4-highgpu-8g"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """The hosts of a run."""

    chip: Chip
    generation: Generation
    topology: str
    """Chips of a slice along each axis, or hosts x GPUs."""
    slices: int
    hosts_per_slice: int
    chips_per_host: int

    @property
    def hosts(self) -> int:
        """Hosts of all slices: JAX processes."""
        return self.hosts_per_slice * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.hosts * self.chips_per_host * self.chip.devices_per_chip

    @property
    def accelerator_type(self) -> str | None:
        """Cloud TPU API's name of one slice, such as `v5p-1024`; None where it has none."""
        if self.generation.accelerator_type is None:
            return None
        chips = self.hosts_per_slice * self.chips_per_host
        return f"{self.generation.accelerator_type}-{chips * self.generation.cores_per_chip}"

    def node(self, machine_type: str | None = None) -> tuple[str, str]:
        """GKE's accelerator label and the machine type of a host. Raises ValueError for another machine type than the generation has."""
        types = {name.format(self.chips_per_host): label for label, name in self.generation.machine_types.items()}
        if machine_type is None:
            machine_type = next(iter(types))
        if machine_type not in types:
            raise ValueError(f"machine_type={machine_type!r} is no host of {self.chip.generation}; use {' or '.join(types)}")
        return types[machine_type], machine_type

    def describe(self) -> str:
        """In words, such as `2 slices of v5e 16x16: 128 hosts of 4 chips, 512 devices`."""
        unit = "GPUs" if self.chip.platform == "gpu" else "chips" if self.chips_per_host > 1 else "chip"
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''} of {self.chips_per_host} {unit}"
        if self.chip.platform == "gpu":
            return f"{self.chip.generation}: {hosts}, {self.devices} devices"
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.chip.generation} {self.topology}: {hosts}, {self.devices} devices"


def machines(target: str, slices: int = 1) -> Machines:
    """The hosts that `target` names, a target of plans (`plait.train.pods.plan.topology.KNOWN`).

    Args:
        target: of one slice.
        slices: TPU slices of that shape, joined by the data-centre network.

    Raises:
        ValueError: an unknown generation, or a shape that it does not come in.
    """
    found = parse_target(target, slices)
    if found.generation not in GENERATIONS:
        raise ValueError(f"target={target!r} is this machine; give the one that the file is for, of {', '.join(GENERATIONS)}")
    chip, generation, shape = CHIPS[found.generation], GENERATIONS[found.generation], found.shape
    topology = "x".join(map(str, shape))
    if chip.platform == "gpu":
        hosts, chips = _gpu_hosts(target, shape)
    else:
        hosts, chips = _tpu_hosts(target, chip.generation, topology, shape)
        if slices > 1 and hosts == 1:
            raise ValueError(
                f"slices={slices} of target={target!r}: several slices must have more than one host each; use one larger slice"
            )
    return Machines(
        chip=chip, generation=generation, topology=topology, slices=slices, hosts_per_slice=hosts, chips_per_host=chips
    )


def _gpu_hosts(target: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if shape[1] != GPUS_PER_HOST:
        raise ValueError(f"target={target!r} must be hosts of {GPUS_PER_HOST} GPUs, as in {target.partition(':')[0]}:8x8 for 64")
    return shape[0], shape[1]


def _tpu_hosts(target: str, generation: str, topology: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Hosts of a slice and chips of each. Of the boxes that the compilers know, not all can be had."""
    chips = math.prod(shape)
    if len(shape) == 2:
        per_host = min(chips, 8) if chips <= 8 else CHIPS_PER_TPU_HOST
        return chips // per_host, per_host
    whole = all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
    if topology not in _BELOW_A_CUBE and not whole:
        ordered = "x".join(map(str, sorted(-(-size // 4) * 4 for size in shape)))
        raise ValueError(
            f"target={target!r} is no shape of {generation}: use {', '.join(_BELOW_A_CUBE)}, or multiples of 4 in rising order, "
            f"as in {generation}:{ordered}"
        )
    largest = GENERATIONS[generation].max_chips
    if largest is not None and chips > largest:
        raise ValueError(
            f"target={target!r} has {chips} chips, and a slice of {generation} at most {largest}; use several slices"
        )
    return chips // CHIPS_PER_TPU_HOST, CHIPS_PER_TPU_HOST

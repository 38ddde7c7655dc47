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
from typing import Literal

from plait.train.pods.plan.chips import CHIPS
from plait.train.pods.plan.topology import parse_target

CHIPS_PER_TPU_HOST = 4
GPUS_PER_HOST = 8
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How schedulers know one generation of accelerators."""

    name: str
    device_kind: str
    """JAX's name."""
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

    @property
    def platform(self) -> Literal["tpu", "gpu"]:
        return CHIPS[self.name].platform

    @property
    def devices_per_chip(self) -> int:
        """JAX devices a chip."""
        return CHIPS[self.name].devices_per_chip


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4",
            device_kind="TPU v4",
            machine_types={"tpu-v4-podslice": "ct4p-hightpu-{}t"},
            accelerator_type="v4",
            cores_per_chip=2,
            runtime_version="tpu-ubuntu2204-base",
        ),
        Generation(
            name="v5e",
            device_kind="TPU v5 lite",
            machine_types={"tpu-v5-lite-podslice": "ct5lp-hightpu-{}t"},
            accelerator_type="v5litepod",
            runtime_version="v2-alpha-tpuv5-lite",
        ),
        Generation(
            name="v5p",
            device_kind="TPU v5",
            machine_types={"tpu-v5p-slice": "ct5p-hightpu-{}t"},
            max_chips=6144,
            accelerator_type="v5p",
            cores_per_chip=2,
            runtime_version="v2-alpha-tpuv5",
        ),
        Generation(
            name="v6e",
            device_kind="TPU v6 lite",
            machine_types={"tpu-v6e-slice": "ct6e-standard-{}t"},
            accelerator_type="v6e",
            runtime_version="v2-alpha-tpuv6e",
        ),
        Generation(
            name="tpu7x",
            device_kind="TPU7x",
            machine_types={"tpu7x": "tpu7x-standard-{}t"},
        ),
        Generation(
            name="h100",
            device_kind="NVIDIA H100",
            machine_types={"nvidia-h100-mega-80gb": "a3-megagpu-8g", "nvidia-h100-80gb": "a3-highgpu-8g"},
        ),
        Generation(name="h200", device_kind="NVIDIA H200", machine_types={"nvidia-h200-141gb": "a3-ultragpu-8g"}),
        Generation(name="b200", device_kind="NVIDIA B200", machine_types={"nvidia-b200": "a4-highgpu-8g"}),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """The hosts of a run."""

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
        return self.hosts * self.chips_per_host * self.generation.devices_per_chip

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
            raise ValueError(f"machine_type={machine_type!r} is no host of {self.generation.name}; use {' or '.join(types)}")
        return types[machine_type], machine_type

    def describe(self) -> str:
        """In words, such as `2 slices of v5e 16x16: 128 hosts of 4 chips, 512 devices`."""
        unit = "GPUs" if self.generation.platform == "gpu" else "chips" if self.chips_per_host > 1 else "chip"
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''} of {self.chips_per_host} {unit}"
        if self.generation.platform == "gpu":
            return f"{self.generation.name}: {hosts}, {self.devices} devices"
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.generation.name} {self.topology}: {hosts}, {self.devices} devices"


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
    generation, shape = GENERATIONS[found.generation], found.shape
    topology = "x".join(map(str, shape))
    if generation.platform == "gpu":
        hosts, chips = _gpu_hosts(target, shape)
    else:
        hosts, chips = _tpu_hosts(target, generation, topology, shape)
        if slices > 1 and hosts == 1:
            raise ValueError(
                f"slices={slices} of target={target!r}: several slices must have more than one host each; use one larger slice"
            )
    return Machines(generation=generation, topology=topology, slices=slices, hosts_per_slice=hosts, chips_per_host=chips)


def _gpu_hosts(target: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if shape[1] != GPUS_PER_HOST:
        raise ValueError(f"target={target!r} must be hosts of {GPUS_PER_HOST} GPUs, as in {target.partition(':')[0]}:8x8 for 64")
    return shape[0], shape[1]


def _tpu_hosts(target: str, generation: Generation, topology: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Hosts of a slice and chips of each. Of the boxes that the compilers know, not all can be had."""
    chips = math.prod(shape)
    if len(shape) == 2:
        per_host = min(chips, 8) if chips <= 8 else CHIPS_PER_TPU_HOST
        return chips // per_host, per_host
    whole = all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
    if topology not in _BELOW_A_CUBE and not whole:
        ordered = "x".join(map(str, sorted(-(-size // 4) * 4 for size in shape)))
        raise ValueError(
            f"target={target!r} is no shape of {generation.name}: use {', '.join(_BELOW_A_CUBE)}, or multiples of 4 in rising order, "
            f"as in {generation.name}:{ordered}"
        )
    if generation.max_chips is not None and chips > generation.max_chips:
        raise ValueError(
            f"target={target!r} has {chips} chips, and a slice of {generation.name} at most {generation.max_chips}; use several slices"
        )
    return chips // CHIPS_PER_TPU_HOST, CHIPS_PER_TPU_HOST

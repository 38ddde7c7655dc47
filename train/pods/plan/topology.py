"""From the name of a machine, such as `v5p:4x8x8` or `h100:8x8`, to described devices that the compilers take for real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
from typing import Any

import jax

from plait.kernels.chips import CHIPS, Chip
from plait.train.pods.plan.gpu_descriptions import GPU_DESCRIPTIONS

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # the slices that v5e and v6e are rented in
_LARGEST = {"v4": 4096, "v5p": 8960, "tpu7x": 9216}  # chips of a pod
_RING = {"v5e": 16, "v6e": 16, "v4": 4, "v5p": 4, "tpu7x": 4}
"""A dimension of the torus wraps around where its size is a multiple of this."""
GPUS_PER_HOST = 8
"""Of every GPU machine that is planned for."""
_MOST_CPUS = 256
_MOST_HOSTS = 2**14
_PODS = "{}, {} and {}".format(*_LARGEST.values())
KNOWN = f"""v5e and v6e: {", ".join(_FLAT)} chips, as in v5e:16x16
v4, v5p and tpu7x: AxBxC chips, each 1, 2 or a multiple of 4, as in v5p:4x8x8 or v5p:16x16x16; up to {_PODS} chips
h100, h200 and b200: HOSTSxGPUS or xGPUS, as in h100:8x8 or h100x64
cpu: devices of this machine, as in cpu:8
Several slices of a TPU pod: --slices 4"""
"""What a target may be."""


class TargetError(ValueError):
    """A target that does not exist, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine by name; no device is described yet."""

    name: str
    generation: str
    """As in `CHIPS`, or `cpu`."""
    shape: tuple[int, ...]
    """Chips along each dimension of a TPU slice; hosts and GPUs of each; CPU devices."""
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        """None for CPUs, of which nothing is known."""
        return CHIPS.get(self.generation)

    @property
    def num_devices(self) -> int:
        """JAX devices, which are half chips on tpu7x."""
        return math.prod(self.shape) * self.slices * (self.chip.devices_per_chip if self.chip else 1)

    def wraps(self, dimension: int) -> bool:
        """Whether the TPU torus closes to a ring along a dimension."""
        size = self.shape[dimension] if dimension < len(self.shape) else 1
        return size % _RING[self.generation] == 0

    def label(self) -> str:
        """For file names."""
        return re.sub(r"[^\w]+", "-", self.name) + (f"-{self.slices}slices" if self.slices > 1 else "")


def parse_target(text: str, slices: int = 1) -> Target:
    """The machine of that name. Raises TargetError, listing what is known, for any other; nothing is loaded or compiled."""
    found = re.fullmatch(r"([a-z]+\d*[a-z]*?)(?::(\d+(?:x\d+)*)|x(\d+))", text.strip().lower())
    name = found[1] if found else re.split(r"[:x]", text.lower())[0]
    if name not in (*CHIPS, "cpu"):
        near = difflib.get_close_matches(name, [*CHIPS, "cpu"], n=1)
        raise TargetError(f"target={text!r} is unknown{f'; did you mean {near[0]}?' if near else ''}\nknown targets:\n{KNOWN}")
    if found is None:
        raise TargetError(f"target={text!r} must be {name}:SHAPE\nknown targets:\n{KNOWN}")
    if slices < 1:
        raise TargetError(f"slices={slices} must be at least 1; use 1")
    shape = tuple(int(n) for n in (found[2] or found[3]).split("x"))
    if name == "cpu" or CHIPS[name].platform == "gpu":
        if slices > 1:
            raise TargetError(f"slices={slices} is for TPUs; give {name} more hosts")
        if min(shape) < 1:
            raise TargetError(f"target={text!r} must have at least one device; use for example cpu:8")
        return Target(text, name, _gpus(text, shape) if name != "cpu" else _cpus(text, shape))
    _check_torus(text, name, shape)
    return Target(text, name, shape, slices)


def _gpus(text: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Hosts and GPUs of each."""
    if len(shape) == 1:
        (count,) = shape
        if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise TargetError(
                f"target={text!r} must be at most {GPUS_PER_HOST} GPUs or a multiple of {GPUS_PER_HOST}, for hosts of {GPUS_PER_HOST}"
            )
        shape = (max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST))
    if len(shape) != 2:
        raise TargetError(f"target={text!r} must be HOSTSxGPUS\nknown targets:\n{KNOWN}")
    if shape[0] > _MOST_HOSTS:
        raise TargetError(f"target={text!r} must have at most {_MOST_HOSTS} hosts; use fewer")
    return shape


def _cpus(text: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 1 or shape[0] > _MOST_CPUS:
        raise TargetError(f"target={text!r} must be cpu:DEVICES with at most {_MOST_CPUS}; use for example cpu:8")
    return shape


def _check_torus(text: str, generation: str, shape: tuple[int, ...]) -> None:
    if generation in _LARGEST:
        fine = len(shape) == 3 and all(n in (1, 2) or n % 4 == 0 for n in shape) and 4 <= math.prod(shape) <= _LARGEST[generation]
    else:
        fine = "x".join(map(str, shape)) in _FLAT
    if not fine:
        raise TargetError(f"target={text!r} is no slice of a {generation} pod\nknown targets:\n{KNOWN}")


def describe_devices(target: Target) -> list[Any]:
    """The devices of a target, as the compilers know them; CPU devices are this machine's own.

    Raises:
        TargetError: what compiles for the target is not installed, or refuses it.
    """
    if target.generation == "cpu":
        return _cpu_devices(target)
    from jax.experimental import topologies

    assert target.chip is not None
    tpu = target.chip.platform == "tpu"
    try:
        if tpu:
            _quiet_libtpu()
            return list(
                topologies.get_topology_desc(platform="tpu", topology_name=_tpu_name(target), **_tpu_options(target)).devices
            )
        if jax.__version_info__ < (0, 11, 2):
            raise TargetError(f"target={target.name!r} needs JAX 0.11.2 or newer, on Python 3.12; this is JAX {jax.__version__}")
        return list(
            topologies.get_topology_desc(
                platform="cuda",
                topology_name=target.generation,
                topology="x".join(map(str, (1, *target.shape))),
                target_config=GPU_DESCRIPTIONS[target.generation],
            ).devices
        )
    except (RuntimeError, ImportError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        needs = "libtpu" if tpu else "JAX's CUDA plugin and ptxas"
        raise TargetError(
            f"target={target.name!r} cannot be described: {reason}; it needs {needs}: pip install 'plait[aot]'\nknown targets:\n{KNOWN}"
        ) from error


def _quiet_libtpu() -> None:
    """No metadata server is asked, and several processes may compile at once."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _tpu_name(target: Target) -> str:
    return f"{target.generation}:{'x'.join(map(str, target.shape))}"


def _tpu_options(target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device
    if math.prod(target.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


def _cpu_devices(target: Target) -> list[Any]:
    """Asks for as many CPU devices as the target has, or as XLA_FLAGS says, for others in this process, if JAX has not started yet."""
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")) or [0]
    with contextlib.suppress(RuntimeError):  # where JAX runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", max(target.num_devices, *map(int, forced)))
    devices = jax.devices("cpu")
    if len(devices) < target.num_devices:
        raise TargetError(
            f"target={target.name!r} has more devices than the {len(devices)} of this process; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={target.num_devices}"
        )
    return devices[: target.num_devices]

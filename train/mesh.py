"""The mesh and the one table that says on which of its axes a named array axis lives."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from plait.configs.mesh import MESH_AXES as AXES
from plait.configs.mesh import MeshConfig
from plait.kernels.context import Exchange
from plait.kernels.sharding import inside, splitting
from plait.models import axes
from plait.models.axes import Axes
from plait.models.divided import Divide, dividing
from plait.models.flow import WHOLE_BATCH, flowing
from plait.train.pipeline import Pipeline

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    axes.LAYERS: "pipeline",
    axes.VOCAB: "tensor",
    axes.EMBED: "fsdp",
    axes.HEADS: "tensor",
    axes.KV_HEADS: "tensor",
    axes.MLP: "tensor",
    axes.EXPERTS: "expert",
    axes.BATCH: ("data", "fsdp", "expert"),
    axes.LENGTH: "context",
}

SLICED = ("pipeline", "data")
"""Axes that may span TPU slices: what crosses them is one activation or gradient a micro-batch, over the data-centre network."""
ZERO = ("pipeline", "data", "expert", "context")
"""Axes over which `mesh.zero` divides moments further."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices`, real or described (all there are by default).

    On TPUs the outermost axes span the slices, and the inner ones join neighbouring chips of one; elsewhere devices go in the order
    of their processes, so that the inner axes stay within a host.

    Raises:
        ValueError: the axes do not multiply to the device count, or the slices do not divide the outermost axes.
    """
    seen = devices is None
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices), _seen if seen else str)
    used = math.prod(sizes.values())
    grid = _torus(devices, sizes) if devices[0].platform == "tpu" and used == len(devices) else _line(devices[:used], sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: MeshConfig, count: int, hint: Callable[[], str] = str) -> dict[str, int]:
    """The size of each axis over so many devices. Raises ValueError, with a hint, where they do not multiply to it."""
    sizes = {name: getattr(config, name) for name in AXES}
    rest = math.prod(size for size in sizes.values() if size is not None)
    sizes = {name: count // rest if size is None else size for name, size in sizes.items()}
    used = math.prod(sizes.values())
    if used != count and not (config.data is not None and used < count and jax.process_count() == 1):
        product = " x ".join(f"mesh.{name}={getattr(config, name)}" for name in AXES)
        raise ValueError(f"{product} must multiply to the {count} devices; leave mesh.data=None to fill them{hint()}")
    return sizes


def _seen() -> str:
    """What JAX sees, and why that may be fewer devices than there are."""
    device, hosts = jax.devices()[0], jax.process_count()
    why = {
        "cpu": "without the extra tpu or cuda, or its driver, JAX takes the CPU, of which "
        "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8",
    }.get(device.platform, "CUDA_VISIBLE_DEVICES and the like hide devices" if device.platform == "gpu" else "")
    joined = "" if hosts > 1 else "--hosts.* joins those of other hosts"
    return f". JAX sees {len(jax.devices())} of kind {device.device_kind!r} on {hosts} host{'s' * (hosts > 1)}: " + "; ".join(
        part for part in (why, joined) if part
    )


def _line(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    return np.asarray(sorted(devices, key=lambda device: device.process_index)).reshape(*sizes.values())


def _torus(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """TPUs by mesh coordinates: slices over `SLICED`, each slice's torus over what is left."""
    slices = left = len({getattr(device, "slice_index", 0) for device in devices})  # a described slice alone has no number
    if devices[0].device_kind == "TPU v4" and any(device.core_on_chip for device in devices):
        return _line(devices, sizes)  # described by the core: their order is that of the chips, which `mesh_utils` does not know
    if slices == 1:
        return mesh_utils.create_device_mesh(list(sizes.values()), devices, allow_split_physical_axes=True)
    across = dict.fromkeys(sizes, 1)
    for axis in SLICED:
        across[axis] = math.gcd(left, sizes[axis])
        left //= across[axis]
    if left > 1:
        inner = math.prod(size for axis, size in sizes.items() if axis not in SLICED)
        raise ValueError(
            f"{' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in SLICED)} must be a multiple of the {slices} slices of the "
            f"{len(devices)} devices; use mesh.data={slices} and at most {len(devices) // slices} devices on the other axes (now {inner})"
        )
    within = [size // across[axis] for axis, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(within, list(across.values()), devices, allow_split_physical_axes=True)


def names_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in a rule, or in a part of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes on which a logical axis lies."""
    return names_of(RULES[name])


def ways(mesh: Mesh, name: str) -> int:
    """In how many parts a mesh divides a logical axis."""
    return _ways(mesh, mesh_axes(name))


def spec(names: Axes) -> PartitionSpec:
    """The partition of an array with these logical axes; a mesh axis is used once, by the first name that asks for it."""
    used: set[str] = set()
    parts: list[Any] = []
    for name in names:
        wanted = tuple(a for a in (mesh_axes(name) if name is not None else ()) if a not in used)
        used.update(wanted)
        parts.append(wanted[0] if len(wanted) == 1 else wanted or None)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, names: Axes, shape: Sequence[int], what: str) -> NamedSharding:
    """The sharding of `what`. Raises ValueError where the mesh does not divide its shape."""
    partition = spec(names)
    for name, size, part in zip(names, shape, partition):
        ways = _ways(mesh, part)
        if size % ways:
            raise ValueError(
                f"{what} has {name}={size}, which mesh {_describe(mesh, part)} must divide; change the mesh or the model"
            )
    return NamedSharding(mesh, partition)


def spread(layout: NamedSharding, names: Axes, shape: Sequence[int]) -> NamedSharding:
    """`layout` divided further over the axes of `ZERO` that it leaves, along the largest dimension that they divide: a whole one before
    one that is divided already, the stacked layers last, and no further where there is none."""
    mesh, parts = layout.mesh, list(layout.spec)
    chosen = None
    for axis in (axis for axis in ZERO if mesh.shape[axis] > 1 and not any(axis in names_of(part) for part in parts)):
        fitting = [i for i, part in enumerate(parts) if shape[i] % (mesh.shape[axis] * _ways(mesh, part)) == 0]
        if fitting:
            chosen = max(fitting, key=lambda i: (i == chosen, names[i] != axes.LAYERS, _ways(mesh, parts[i]) == 1, shape[i]))
            parts[chosen] = (*names_of(parts[chosen]), axis)
    return NamedSharding(mesh, PartitionSpec(*parts))


def batch_sharding(mesh: Mesh, batch_size: int, seq_len: int, accumulate: int) -> NamedSharding:
    """The sharding of a batch `[B, T]`. Raises ValueError where a micro-batch or a sequence does not divide over its axes."""
    partition = spec((axes.BATCH, axes.LENGTH))
    rows, tokens = (_ways(mesh, part) for part in partition)
    if (batch_size // accumulate) % rows:
        raise ValueError(
            f"data.batch_size={batch_size} / optimizer.accumulate={accumulate} must be a multiple of mesh {_describe(mesh, partition[0])}; "
            f"use a batch of {rows * accumulate * max(1, batch_size // (rows * accumulate))} rows"
        )
    if tokens > 1 and seq_len % (2 * tokens):
        raise ValueError(
            f"data.seq_len={seq_len} must be a multiple of 2 x mesh {_describe(mesh, partition[1])}, for each device two equal halves; "
            f"use data.seq_len={2 * tokens * max(1, seq_len // (2 * tokens))}"
        )
    return NamedSharding(mesh, partition)


def constrainer(mesh: Mesh) -> axes.Constrain:
    """The activation rule for `plait.models.axes.constraining`: pins what the mesh divides, leaves the rest to the compiler."""

    def constrain(x: jax.Array, names: Axes) -> jax.Array:
        parts = [part if size % _ways(mesh, part) == 0 else None for size, part in zip(x.shape, spec(names))]
        return jax.lax.with_sharding_constraint(x, NamedSharding(inside(mesh), PartitionSpec(*parts)))

    return constrain


def divider(mesh: Mesh) -> Divide:
    """What runs work by device for `plait.models.divided`: a logical axis is divided where the mesh divides it in every array."""

    def divide(function: Callable[..., Any], arrays: tuple[jax.Array, ...], names: tuple[Axes, ...], results: Any) -> Any:
        if mesh.size == 1:
            return function(lambda name: (), *arrays)
        sizes = [(name, size) for one, a in zip(names, arrays, strict=True) for name, size in zip(one, a.shape, strict=True)]
        whole = {name for name, size in sizes if name is not None and size % ways(mesh, name)}
        parts = lambda one: spec(tuple(None if name in whole else name for name in one))
        over = lambda name: () if name in whole else tuple(a for a in mesh_axes(name) if mesh.shape[a] > 1)
        return jax.shard_map(
            functools.partial(function, over),
            mesh=inside(mesh),
            in_specs=tuple(map(parts, names)),
            out_specs=tuple(map(parts, results)),
            check_vma=False,
        )(*arrays)

    return divide


@contextlib.contextmanager
def on_mesh(mesh: Mesh, microbatches: int = 1, exchange: Exchange = "gather") -> Iterator[None]:
    """Traces models for the mesh: activations are pinned to it, each device runs the kernels on its part, and where the mesh has a
    pipeline, the rows of a batch flow through it in `microbatches` parts. `exchange` is `mesh.context_exchange`."""
    rules = {"batch": axes.BATCH, "heads": axes.HEADS, "context": axes.LENGTH}
    over = {key: mesh_axes(name) for key, name in rules.items()}
    flow = Pipeline(mesh, microbatches) if mesh.shape["pipeline"] > 1 else WHOLE_BATCH
    with (
        axes.constraining(constrainer(mesh)),
        splitting(mesh, **over, alone=("pipeline",), exchange=exchange),
        flowing(flow),
        dividing(divider(mesh)),
    ):
        yield


def _ways(mesh: Mesh | AbstractMesh, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in names_of(part))


def _describe(mesh: Mesh, part: str | tuple[str, ...] | None) -> str:
    return " x ".join(f"{name}={mesh.shape[name]}" for name in names_of(part))

"""The mesh and the one table that says on which of its axes a named array axis lives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait.configs.experiment import MeshConfig
from plait.kernels.sharding import splitting
from plait.models import axes
from plait.models.axes import Axes

AXES = ("data", "fsdp", "tensor")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    axes.LAYERS: None,
    axes.VOCAB: "tensor",
    axes.EMBED: "fsdp",
    axes.HEADS: "tensor",
    axes.KV_HEADS: "tensor",
    axes.MLP: "tensor",
    axes.BATCH: ("data", "fsdp"),
    axes.LENGTH: None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all there are by default). Raises ValueError where the axes do not multiply to the device count."""
    devices = list(jax.devices() if devices is None else devices)
    rest = config.fsdp * config.tensor
    data = config.data if config.data is not None else len(devices) // rest
    if data * rest != len(devices) and not (config.data is not None and data * rest < len(devices) and jax.process_count() == 1):
        raise ValueError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} must multiply to the {len(devices)} devices; "
            "leave mesh.data=None to fill them"
        )
    grid = np.asarray(devices[: data * rest]).reshape(data, config.fsdp, config.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: Axes) -> PartitionSpec:
    """The partition of an array with these logical axes; a mesh axis is used once, by the first name that asks for it."""
    used: set[str] = set()
    parts: list[Any] = []
    for name in names:
        rule = RULES[name] if name is not None else None
        wanted = tuple(a for a in ((rule,) if isinstance(rule, str) else rule or ()) if a not in used)
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


def batch_sharding(mesh: Mesh, batch_size: int, accumulate: int) -> NamedSharding:
    """The sharding of a batch's rows. Raises ValueError where a micro-batch does not divide over the data axes."""
    partition = spec((axes.BATCH, axes.LENGTH))
    ways = _ways(mesh, partition[0])
    if (batch_size // accumulate) % ways:
        raise ValueError(
            f"data.batch_size={batch_size} / optimizer.accumulate={accumulate} must be a multiple of mesh {_describe(mesh, partition[0])}; "
            f"use a batch of {ways * accumulate * max(1, batch_size // (ways * accumulate))} rows"
        )
    return NamedSharding(mesh, partition)


def constrainer(mesh: Mesh) -> axes.Constrain:
    """The activation rule for `plait.models.axes.constraining`: pins what the mesh divides, leaves the rest to the compiler."""

    def constrain(x: jax.Array, names: Axes) -> jax.Array:
        parts = [part if size % _ways(mesh, part) == 0 else None for size, part in zip(x.shape, spec(names))]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))

    return constrain


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Traces models for the mesh: activations are pinned to it, and each device runs the kernels on its part."""
    batch, heads = (RULES[name] for name in (axes.BATCH, axes.HEADS))
    over = {key: (rule,) if isinstance(rule, str) else tuple(rule or ()) for key, rule in (("batch", batch), ("heads", heads))}
    with axes.constraining(constrainer(mesh)), splitting(mesh, **over):
        yield


def _ways(mesh: Mesh, part: str | tuple[str, ...] | None) -> int:
    names = (part,) if isinstance(part, str) else part or ()
    return math.prod(mesh.shape[name] for name in names)


def _describe(mesh: Mesh, part: str | tuple[str, ...] | None) -> str:
    names = (part,) if isinstance(part, str) else part or ()
    return " x ".join(f"{name}={mesh.shape[name]}" for name in names)

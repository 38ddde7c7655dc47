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

AXES = ("data", "fsdp", "context", "tensor")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    axes.LAYERS: None,
    axes.VOCAB: "tensor",
    axes.EMBED: "fsdp",
    axes.HEADS: "tensor",
    axes.KV_HEADS: "tensor",
    axes.MLP: "tensor",
    axes.BATCH: ("data", "fsdp"),
    axes.LENGTH: "context",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all there are by default). Raises ValueError where the axes do not multiply to the device count."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in AXES}
    rest = math.prod(size for size in sizes.values() if size is not None)
    sizes = {name: len(devices) // rest if size is None else size for name, size in sizes.items()}
    used = math.prod(sizes.values())
    if used != len(devices) and not (config.data is not None and used < len(devices) and jax.process_count() == 1):
        product = " x ".join(f"mesh.{name}={getattr(config, name)}" for name in AXES)
        raise ValueError(f"{product} must multiply to the {len(devices)} devices; leave mesh.data=None to fill them")
    grid = np.asarray(devices[:used]).reshape(*sizes.values())
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
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*parts)))

    return constrain


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Traces models for the mesh: activations are pinned to it, and each device runs the kernels on its part."""
    rules = {"batch": axes.BATCH, "heads": axes.HEADS, "context": axes.LENGTH}
    over = {key: _names(RULES[name]) for key, name in rules.items()}
    with axes.constraining(constrainer(mesh)), splitting(mesh, **over):
        yield


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def _ways(mesh: Mesh, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _names(part))


def _describe(mesh: Mesh, part: str | tuple[str, ...] | None) -> str:
    return " x ".join(f"{name}={mesh.shape[name]}" for name in _names(part))

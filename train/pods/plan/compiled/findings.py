"""What a compiled step exchanges that its layout does not call for."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from plait.models import axes
from plait.train.mesh import mesh_axes, names_of
from plait.train.pods.plan.compiled.hlo import Instruction
from plait.train.pods.plan.memory import size_text
from plait.train.program import Program

_SMALL = 2**20  # bytes a step that nobody needs to hear of

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Parameters as a device sees them once they are gathered over the axes that also split the batch (FSDP)."""

    axes: frozenset[str]
    """The axes over which parameters are gathered."""
    single: dict[Shape, str]
    """The first parameter of one layer with these dimensions, sorted, without ones."""
    stacked: dict[Shape, str]
    """The parameters of all layers at once."""
    whole: dict[Shape, str]
    """Gathered over every axis, where that is more than over `axes`."""


def find_oddities(step: Program, found: Sequence[Instruction], rematerialized: Sequence[str]) -> list[str]:
    """A sentence for each kind of exchange that costs more than it has to; empty when there is none."""
    weights = _weights(step)
    return [
        *_turned_into_all_reduce(found, weights),
        *_gathers(found, weights, step),
        *_permutes(found),
        *_rematerialized(rematerialized),
        *_unknown_loops(found),
    ]


def _weights(step: Program) -> _Weights:
    batch = set(mesh_axes(axes.BATCH)) - set(mesh_axes(axes.EXPERTS))  # experts are never gathered
    state: Any = step.like.params
    gathered: set[str] = set()
    single: dict[Shape, str] = {}
    stacked: dict[Shape, str] = {}
    whole: dict[Shape, str] = {}
    for name, array in state.items():
        parts = [names_of(part) for part in array.sharding.spec] + [()] * array.ndim
        over = [{a for a in part if step.mesh.shape[a] > 1} for part in parts]
        gathered |= set().union(*over) & batch
        layers = step.blueprint.axes(name)[0] == axes.LAYERS
        dims = [size // math.prod(step.mesh.shape[a] for a in split - batch) for size, split in zip(array.shape, over)]
        if len(dims) - layers < 2:
            continue  # gains and biases
        if set().union(*over) & batch:
            single.setdefault(_normal(dims[1:] if layers else dims), name)
            if layers:
                stacked.setdefault(_normal(dims), name)
        if set().union(*over) - batch:
            whole.setdefault(_normal(array.shape[1:] if layers else array.shape), name)
    return _Weights(frozenset(gathered), single, stacked, {k: v for k, v in whole.items() if k not in single})


def _turned_into_all_reduce(found: Sequence[Instruction], weights: _Weights) -> list[str]:
    """Gradients reduced whole where each device keeps a part, and parameters gathered by adding up zero-padded parts."""
    size = 0.0
    for one in found:
        if one.kind == "all-reduce" and weights.axes & set(one.axes):
            size += one.times * sum(_bytes(one, shape) for shape in one.shapes if _normal(shape[1]) in weights.single)
    if size <= _SMALL:
        return []
    return [
        f"{size_text(size)} a step of whole parameters or gradients are all-reduced over {' x '.join(sorted(weights.axes))}, twice the "
        "bytes of the all-gather or reduce-scatter that would do; TPUs compile them so where the axis spans all chips of a slice: give it "
        "a half or a quarter of them and the rest to another axis"
    ]


def _gathers(found: Sequence[Instruction], weights: _Weights, step: Program) -> list[str]:
    stacked: dict[str, float] = collections.defaultdict(float)
    whole: dict[str, float] = collections.defaultdict(float)
    wide: dict[str, float] = collections.defaultdict(float)
    compute = jnp.dtype(step.config.model.compute_dtype).itemsize
    for one in found:
        if one.kind != "all-gather":
            continue
        for dtype, shape in one.shapes:
            key, size = _normal(shape), one.times * _bytes(one, (dtype, shape))
            if key in weights.stacked and key not in weights.single:
                stacked[weights.stacked[key]] += size
            elif key in weights.whole and set(one.axes) - weights.axes:
                whole[weights.whole[key]] += size
            if dtype == "f32" and compute < 4 and key in {**weights.single, **weights.stacked}:
                wide[{**weights.single, **weights.stacked}[key]] += size
    messages = []
    if sum(stacked.values()) > _SMALL:
        messages.append(
            f"{size_text(sum(stacked.values()))} a step: parameters of all layers gathered at once, not a layer at a time: {_few(stacked)}"
        )
    if sum(whole.values()) > _SMALL:
        messages.append(
            f"{size_text(sum(whole.values()))} a step: whole parameters gathered, "
            f"though each device needs only its own part: {_few(whole)}"
        )
    if sum(wide.values()) > _SMALL:
        messages.append(
            f"{size_text(sum(wide.values()))} a step: parameters gathered in float32 and rounded after, twice the bytes: {_few(wide)}"
        )
    return messages


def _permutes(found: Sequence[Instruction]) -> list[str]:
    """Permutations over axes whose layout asks for none: rings of tokens and pipelines of layers do."""
    expected = {*mesh_axes(axes.LENGTH), *mesh_axes(axes.LAYERS)}
    size: dict[str, float] = collections.defaultdict(float)
    count = 0
    for one in found:
        if one.kind == "collective-permute" and set(one.axes) - expected:
            size[f"{_short(one.op)} over {' x '.join(one.axes)}"] += one.times * one.bytes
            count += one.times
    total = sum(size.values())
    if total <= _SMALL:
        return []
    return [
        f"{size_text(total)} a step in {count} collective-permutes, as where a fused projection is split over an axis: {_few(size)}"
    ]


def _rematerialized(lines: Sequence[str]) -> list[str]:
    messages = dict.fromkeys(line[line.find("The compiler cannot") :].split(". As the last")[0] for line in lines)
    return [f"[SPMD] involuntary full rematerialization, a layout bug: {message}" for message in messages]


def _unknown_loops(found: Sequence[Instruction]) -> list[str]:
    count = sum(not one.trips_known for one in found)
    return [f"{count} collectives are in loops of unknown length and count once"] if count else []


def _bytes(one: Instruction, shape: tuple[str, Shape]) -> float:
    return dataclasses.replace(one, shapes=(shape,)).bytes


def _normal(shape: Iterable[int]) -> Shape:
    return tuple(sorted(n for n in shape if n != 1))


def _few(sizes: dict[str, float], most: int = 3) -> str:
    top = sorted(sizes, key=lambda name: -sizes[name])
    return ", ".join(top[:most]) + (f" and {len(top) - most} more" if len(top) > most else "") + " (or others of the shape)"


def _short(op: str) -> str:
    return op.rsplit("/", 1)[-1] or "?"

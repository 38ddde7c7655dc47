"""From tensors straight into sharded arrays, and back: one tensor in the host's memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from plait.models.hf.base import Line
from plait.models.hf.places import Place
from plait.models.hf.transforms import Shape


class _Filling:
    """The parts of one array that this host's devices hold, being filled."""

    def __init__(self, like: jax.ShapeDtypeStruct, sharding: NamedSharding, stacked: int):
        """Args: `stacked` leading axes, along which the array comes entry by entry."""
        self.like, self.sharding = like, sharding
        self.left = math.prod(like.shape[:stacked])
        """Entries yet to come."""
        self.parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        self.devices = sharding.addressable_devices_indices_map(like.shape)
        for index in self.devices.values():
            bounds = _bounds(index, like.shape)
            if bounds not in self.parts:
                self.parts[bounds] = np.empty([stop - start for start, stop in bounds], like.dtype)

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        for bounds, part in self.parts.items():
            lead, inside = bounds[: len(index)], bounds[len(index) :]
            if all(start <= i < stop for i, (start, stop) in zip(index, lead, strict=True)):
                own = tuple(i - start for i, (start, _) in zip(index, lead, strict=True))
                part[own] = value[tuple(slice(*bound) for bound in inside)]
        self.left -= 1

    def array(self) -> jax.Array:
        shards = [jax.device_put(self.parts[_bounds(index, self.like.shape)], device) for device, index in self.devices.items()]
        return jax.make_array_from_single_device_arrays(self.like.shape, self.sharding, shards)


def _bounds(index: Any, shape: Shape) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def read_arrays(
    lines: Sequence[Line],
    read: Callable[[str], np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """The parameters that `lines` make of tensors; those of one array should stand together.

    Args:
        read: gives the tensor of a name.
        shapes: of the parameters, by path, with the dtypes that they get.
        shardings: of the parameters.
    """
    made = (zip(line.places, line.transform.read([read(name) for name in line.tensors]), strict=True) for line in lines)
    return filled((part for parts in made for part in parts), shapes, shardings)


def filled(
    parts: Iterable[tuple[Place, np.ndarray]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """Arrays by path of what lies at their places; an array leaves the host's memory with its last part."""
    done: dict[str, jax.Array] = {}
    filling: dict[str, _Filling] = {}
    for place, value in parts:
        if place.path not in filling:
            filling[place.path] = _Filling(shapes[place.path], shardings[place.path], len(place.index))
        filling[place.path].put(place.index, value)
        if not filling[place.path].left:
            done[place.path] = filling.pop(place.path).array()
    return done


def part_of(array: jax.Array, place: Place) -> np.ndarray:
    """What lies at a place, on this host."""
    return np.asarray(array[place.index])


def written(lines: Sequence[Line]) -> Iterator[tuple[str, Line, int]]:
    """The tensors of lines: name, line, and which of the line's tensors it is."""
    for line in lines:
        for index, name in enumerate(line.tensors):
            yield name, line, index

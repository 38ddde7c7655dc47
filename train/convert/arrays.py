"""From tensors straight into sharded arrays, and back: one tensor in the host's memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.models.hf.base import Line
from plait.models.hf.places import Place
from plait.models.hf.transforms import size_of

_SMALL = 1 << 16
"""Bytes of an array that is gathered whole: laying entries compiles a program for each device."""


class _Filling:
    """The parts of one array that this host's devices hold. What comes entry by entry is gathered in the host's memory for one entry of
    the first axis, a layer of many, and goes to the devices with the last of it; small arrays are gathered whole."""

    def __init__(self, like: jax.ShapeDtypeStruct, sharding: NamedSharding, stacked: int):
        """Args: `stacked` leading axes, along which the array comes entry by entry."""
        self.like, self.sharding = like, sharding
        self.layered = stacked > 0
        small = self.layered and size_of(like.shape, like.dtype.itemsize) <= _SMALL
        self.whole = np.zeros(like.shape, like.dtype) if small else None
        self.held = _held(like, sharding, stacked)
        self.left = int(self.held.sum())
        """Entries yet to come."""
        self.coming: dict[int, dict[tuple[int, ...], np.ndarray]] = {}
        """By place on the first axis, what has come of it."""
        where = sharding.addressable_devices_indices_map(like.shape)
        self.devices = {device: index for device, index in where.items() if index is not None}
        self.parts: dict[jax.Device, jax.Array] = {}

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        if not self.held[index]:
            return
        self.left -= 1
        if self.whole is not None:
            self.whole[index] = value
            if self.left:
                return
            value = self.whole
        if not self.layered or self.whole is not None:
            whole = np.asarray(value, self.like.dtype)
            self.parts = {device: jax.device_put(_cut(whole, at), device) for device, at in self.devices.items()}
            return
        first, rest = index[0], index[1:]
        entries = self.coming.setdefault(first, {})
        entries[rest] = value
        if len(entries) == self.held[first].sum():
            whole = np.empty(self.like.shape[1:], self.like.dtype)
            for place, entry in self.coming.pop(first).items():
                whole[place] = entry
            self._lay(first, whole)

    def _lay(self, first: int, value: np.ndarray) -> None:
        """Puts an entry of the first axis on the devices that hold it."""
        for device, (along, *at) in self.devices.items():
            start, stop = along.indices(self.like.shape[0])[:2]
            if start <= first < stop:
                own = jax.device_put(_cut(value, at), device)
                if device not in self.parts:
                    self.parts[device] = jnp.zeros((stop - start, *own.shape), own.dtype, device=device)
                self.parts[device] = _laid(self.parts[device], own, first - start)

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.like.shape, self.sharding, [self.parts[d] for d in self.devices])


@functools.partial(jax.jit, donate_argnums=0)
def _laid(array: jax.Array, entry: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, entry, index, 0)  # in place; a scatter of bfloat16 is not, on CPU


def _held(like: jax.ShapeDtypeStruct, sharding: NamedSharding, stacked: int) -> np.ndarray:
    """Of which entries along the first `stacked` axes this host's devices hold a part."""
    found = np.zeros(like.shape[:stacked], bool)
    for index in sharding.addressable_devices_indices_map(like.shape).values():
        found[(index or ())[:stacked]] = True
    return found


def _cut(whole: np.ndarray, at: Sequence[slice]) -> np.ndarray:
    """A device's part, in memory of its own."""
    return np.asarray(whole[tuple(at)], order="C")


def read_arrays(
    lines: Sequence[Line],
    read: Callable[[str], np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """The parameters that `lines` make of tensors; those of one array should stand together. On several hosts, each reads the tensors of which
    its devices hold something.

    Args:
        read: gives the tensor of a name.
        shapes: of the parameters, by path, with the dtypes that they get.
        shardings: of the parameters.
    """
    held: dict[str, np.ndarray] = {}

    def here(place: Place) -> bool:
        if place.path not in held:
            held[place.path] = _held(shapes[place.path], shardings[place.path], len(place.index))
        return bool(held[place.path][place.index])

    own = (line for line in lines if any(map(here, line.places)))
    made = (zip(line.places, line.transform.read([read(name) for name in line.tensors]), strict=True) for line in own)
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
    """What lies at a place, on this host. Where several hosts hold the array, all of them must ask for it together."""
    if array.is_fully_addressable:
        return np.asarray(array)[place.index] if array.nbytes <= _SMALL else np.asarray(array[place.index])
    assert isinstance(array.sharding, NamedSharding)
    return np.asarray(_gathered(array.sharding.mesh)(array, place.index))


@functools.cache
def _gathered(mesh: Mesh) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """What lays an entry of an array on every device."""
    entry = lambda array, index: array.at[index].get(mode="promise_in_bounds")
    return jax.jit(entry, out_shardings=NamedSharding(mesh, PartitionSpec()))


def written(lines: Sequence[Line]) -> Iterator[tuple[str, Line, int]]:
    """The tensors of lines: name, line, and which of the line's tensors it is."""
    for line in lines:
        for index, name in enumerate(line.tensors):
            yield name, line, index

"""What makes a tensor of a family an array of the model, and back. Each is a bijection: there and back gives the same bits.

Tensors of a linear map are `[out, in]` in PyTorch, kernels here `[in, out]`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


class Transform(abc.ABC):
    """Several tensors, in the order of a table's line, to several arrays."""

    @abc.abstractmethod
    def read(self, tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The arrays."""

    @abc.abstractmethod
    def write(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The tensors."""

    @abc.abstractmethod
    def shapes(self, arrays: Sequence[Shape]) -> list[Shape]:
        """Those of the tensors, by those of the arrays."""


class Alone(Transform):
    """One tensor to one array."""

    @abc.abstractmethod
    def read_one(self, tensor: np.ndarray) -> np.ndarray:
        """The array."""

    @abc.abstractmethod
    def write_one(self, array: np.ndarray) -> np.ndarray:
        """The tensor."""

    @abc.abstractmethod
    def shape(self, array: Shape) -> Shape:
        """That of the tensor."""

    def read(self, tensors):
        return [self.read_one(tensor) for tensor in tensors]

    def write(self, arrays):
        return [self.write_one(array) for array in arrays]

    def shapes(self, arrays):
        return [self.shape(array) for array in arrays]


@dataclasses.dataclass(frozen=True)
class Same(Alone):
    """As it is."""

    def read_one(self, tensor):
        return tensor

    def write_one(self, array):
        return array

    def shape(self, array):
        return array


@dataclasses.dataclass(frozen=True)
class Transposed(Alone):
    """`[out, in]` to `[in, out]`."""

    def read_one(self, tensor):
        return tensor.swapaxes(-1, -2)

    write_one = read_one

    def shape(self, array):
        return (*array[:-2], array[-1], array[-2])


@dataclasses.dataclass(frozen=True)
class Alternated(Transposed):
    """`[out, in]`, the outputs of which are runs of heads, to `[in, out]`, in which a head of one stands beside those of the others."""

    heads: int
    """Of a run."""
    runs: int = 2

    def read_one(self, tensor):
        alternated = tensor.reshape(self.runs, self.heads, -1, tensor.shape[-1]).swapaxes(0, 1)
        return super().read_one(alternated.reshape(tensor.shape))

    def write_one(self, array):
        rows = super().write_one(array)
        return rows.reshape(self.heads, self.runs, -1, rows.shape[-1]).swapaxes(0, 1).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class Fused(Transform):
    """One tensor to several arrays that stand beside each other in its output axis: all of one after all of another, or, with `groups`, a
    share of each for every group of channels (heads).

    `transposed` says whether the tensor is `[out, in]`, or `[out]`; else it is as kernels are, the output last.
    """

    sizes: tuple[int, ...]
    """Outputs of each array."""
    groups: int = 1
    transposed: bool = True

    def read(self, tensors):
        (tensor,) = tensors
        rows = tensor if self.transposed else tensor.swapaxes(-1, 0)
        grouped = rows.reshape(self.groups, -1, *rows.shape[1:])
        cuts = np.cumsum([size // self.groups for size in self.sizes])[:-1]
        return [part.reshape(-1, *rows.shape[1:]).T for part in np.split(grouped, cuts, axis=1)]

    def write(self, arrays):
        parts = [array.T.reshape(self.groups, -1, *array.T.shape[1:]) for array in arrays]
        whole = np.concatenate(parts, axis=1)
        rows = whole.reshape(-1, *whole.shape[2:])
        return [rows if self.transposed else rows.swapaxes(-1, 0)]

    def shapes(self, arrays):
        inputs = arrays[0][:-1]
        out = (sum(self.sizes),)
        return [(*out, *inputs) if self.transposed else (*inputs, *out)]


@dataclasses.dataclass(frozen=True)
class Widened(Alone):
    """A vector that the tensor keeps with axes of one before and after."""

    before: int
    after: int

    def read_one(self, tensor):
        return tensor.reshape(-1)

    def write_one(self, array):
        return array.reshape(self.shape(array.shape))

    def shape(self, array):
        return (1,) * self.before + array + (1,) * self.after


@dataclasses.dataclass(frozen=True)
class Rows(Alone):
    """A vector that the tensor keeps in rows, as one a head."""

    channels: int
    """Of a row."""

    def read_one(self, tensor):
        return tensor.reshape(-1)

    def write_one(self, array):
        return array.reshape(self.shape(array.shape))

    def shape(self, array):
        return (array[0] // self.channels, self.channels)


@dataclasses.dataclass(frozen=True)
class Unused(Transform):
    """No tensor to an array that is not used: layers here are alike where those of the family are not."""

    size: Shape

    def read(self, tensors):
        return [np.zeros(self.size, np.float32)]

    def write(self, arrays):
        return []

    def shapes(self, arrays):
        return []


class Interleaved(Transform):
    """One tensor to two arrays, whose entries along the last axis take turns in it."""

    def read(self, tensors):
        (tensor,) = tensors
        return [tensor[..., ::2], tensor[..., 1::2]]

    def write(self, arrays):
        whole = np.stack(arrays, axis=-1)
        return [whole.reshape(*whole.shape[:-2], -1)]

    def shapes(self, arrays):
        return [(*arrays[0][:-1], 2 * arrays[0][-1])]


class Taps(Alone):
    """A depthwise convolution, `[channels, 1, taps]`, to `[taps, channels]`."""

    def read_one(self, tensor):
        return tensor[:, 0].T

    def write_one(self, array):
        return array.T[:, None]

    def shape(self, array):
        return (array[1], 1, array[0])


class AlternatedTaps(Alternated):
    """One whose channels are runs of heads."""

    def read_one(self, tensor):
        return super().read_one(tensor[:, 0])

    def write_one(self, array):
        return super().write_one(array)[:, None]

    def shape(self, array):
        return (array[1], 1, array[0])


class FusedTaps(Fused):
    """Several of these as one, beside each other in the channels."""

    def read(self, tensors):
        return super().read([tensors[0][:, 0]])

    def write(self, arrays):
        (whole,) = super().write(arrays)
        return [whole[:, None]]

    def shapes(self, arrays):
        return [(sum(self.sizes), 1, arrays[0][0])]


class Halves(Transform):
    """The linear maps of experts, `[experts, out, in]`, to two stacks of them that stand one after the other in the output axis."""

    def read(self, tensors):
        return [half.swapaxes(-1, -2) for half in np.split(tensors[0], 2, axis=-2)]

    def write(self, arrays):
        return [np.concatenate([array.swapaxes(-1, -2) for array in arrays], axis=-2)]

    def shapes(self, arrays):
        experts, inputs, outputs = arrays[0]
        return [(experts, 2 * outputs, inputs)]


def size_of(shape: Shape, itemsize: int) -> int:
    """Bytes of an array."""
    return math.prod(shape) * itemsize

"""Softmax attention as parts side by side, each with some of its heads: the same function, since the output is a sum over heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flax import nnx

from plait.configs.domains import choices
from plait.models.axes import HEADS, KV_HEADS, Axes
from plait.models.hf.transforms import Shape
from plait.models.mixers.base import abstract
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.rotary import RotaryConfig


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """Some heads of softmax attention, and what of each of its parameters is theirs."""

    softmax: SoftmaxConfig
    d_model: int
    heads: tuple[int, ...]
    """Query heads, all those of each key head that they have."""

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Their key heads."""
        num_heads, num_kv_heads = self.softmax.heads(self.d_model)
        return tuple(dict.fromkeys(head * num_kv_heads // num_heads for head in self.heads))

    def config(self, *, first: bool) -> SoftmaxConfig:
        """As a mixer of its own; of several, the first has what the layer has once."""
        return dataclasses.replace(
            self.softmax, num_heads=len(self.heads), num_kv_heads=len(self.kv_heads), o_bias=self.softmax.o_bias and first
        )

    def shape(self, path: str, shape: Shape) -> Shape:
        """That of its part of a parameter."""
        found = self._along(path)
        if found is None:
            return shape
        axis, heads, count = found
        return (*shape[:axis], shape[axis] // count * len(heads), *shape[axis + 1 :])

    def cut(self, path: str, x: np.ndarray) -> np.ndarray:
        """Its part of a parameter, by the path in the mixer; all of what heads share."""
        found = self._along(path)
        if found is None:
            return x
        axis, heads, count = found
        apart = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
        return apart[(slice(None),) * axis + ([*heads],)].reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def _along(self, path: str) -> tuple[int, Sequence[int], int] | None:
        """The axis of a parameter along which heads lie, which of them are its own, and of how many; None where none do."""
        axes = _axes(self.softmax, self.d_model).get(path, ())
        num_heads, num_kv_heads = self.softmax.heads(self.d_model)
        for axis, name in enumerate(axes):
            if name == HEADS:
                return axis, self.heads, num_heads
            if name == KV_HEADS:
                return axis, self.kv_heads, num_kv_heads
        return None


def _axes(softmax: SoftmaxConfig, d_model: int) -> Mapping[str, Axes]:
    variables = nnx.to_flat_state(nnx.state(abstract(softmax, d_model), nnx.Param))
    return {".".join(map(str, path)): variable.get_metadata()["axes"] for path, variable in variables}


def head_parts(softmax: SoftmaxConfig, d_model: int, heads: Collection[int]) -> tuple[HeadPart, HeadPart]:
    """Those heads, and the others. Raises ValueError, in a message that goes on after the layer, where they cannot be parted."""
    num_heads, num_kv_heads = softmax.heads(d_model)
    size = num_heads // num_kv_heads
    for head in sorted(heads):
        together = range(head // size * size, head // size * size + size)
        if not set(together) <= {*heads}:
            raise ValueError(f"shares the keys of head {head} between its heads {choices(together)}; name all of them, or none")
    if len({*heads}) == num_heads:
        raise ValueError(f"has no other heads than these {num_heads}; let it keep its name in the pattern")
    positions, shared = softmax.positions, softmax.carries(d_model)
    if not isinstance(positions, RotaryConfig | None):
        raise ValueError(f"has positions {positions.name!r}, which are not the same for all heads, and cannot be parted")
    if softmax.qk_norm and softmax.qk_norm_over == "width":
        raise ValueError("has qk_norm_over='width', a norm over all heads, and cannot be parted")
    if shared:
        raise ValueError(f"shares {shared[0].name} with other layers, and cannot be parted")
    rest = tuple(head for head in range(num_heads) if head not in heads)
    return HeadPart(softmax, d_model, tuple(sorted({*heads}))), HeadPart(softmax, d_model, rest)

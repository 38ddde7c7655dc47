"""Fewer key and value heads: MHA to GQA, either of them to MQA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from plait.configs.domains import Counted, Heads, choices, divisors
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.kdgqa import KDGQAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.train.convert.reshapes.base import (
    Making,
    Reshape,
    Shapes,
    Subject,
    chosen,
    core,
    core_path,
    is_softmax,
    register,
    require_plain,
    with_core,
    with_mixers,
)
from plait.train.convert.weights import ConvertError

_AXES = {"k.kernel": 1, "v.kernel": 1, "k.bias": 0, "v.bias": 0, "k_bias": 0, "v_bias": 0, "value_scale": 0}
"""On which axis of a parameter the key and value heads stand one after another."""
_OVER_WIDTH = {"k_norm.scale": 0, "k_norm.bias": 0}
"""The same where all heads are normalised as one."""


@register("kv_heads", source="GQA (2305.13245); Key-Driven Grouped Query Attention (2408.08454)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVHeads(Reshape):
    """Softmax attention with fewer key and value heads, each the mean of those of its group: kernels, biases and gains.

    `key_driven` makes it `kdgqa`, which begins as the same function and, in training, gives groups queries by the norms of their keys.
    """

    num_kv_heads: Heads = 8
    """Key and value heads, a divisor of those there are (1: MQA)."""
    grouping: Literal["mean", "key_driven"] = "mean"
    """Whether groups stay alike or follow their keys."""
    layers: tuple[Counted, ...] | None = None
    """Numbers of the layers, with commas; all with softmax attention by default."""

    def model(self, subject: Subject):
        model = subject.model
        found = {}
        for index in chosen(model, self.layers, is_softmax, "softmax attention"):
            mixer, name = model.layer_mixers[index], model.layers[index]
            softmax = core(mixer)
            assert isinstance(softmax, SoftmaxConfig)
            _, heads = softmax.heads(model.d_model)
            if heads % self.num_kv_heads:
                raise ConvertError(
                    f"num_kv_heads={self.num_kv_heads} must divide the {heads} key and value heads of model.mixers.{name}; "
                    f"use one of {choices(divisors(heads))}"
                )
            found[index] = with_core(mixer, self._smaller(subject, softmax, name))
        return with_mixers(model, found, "grouped")

    def _smaller(self, subject: Subject, softmax: SoftmaxConfig, name: str) -> MixerConfig:
        if self.grouping == "mean":
            same = softmax.heads(subject.model.d_model)[1] == self.num_kv_heads
            return softmax if same else dataclasses.replace(softmax, num_kv_heads=self.num_kv_heads)
        require_plain(subject.model, softmax, name, "kdgqa", kept=("positions",))
        return KDGQAConfig(
            num_heads=softmax.heads(subject.model.d_model)[0],
            num_kv_heads=self.num_kv_heads,
            head_dim=softmax.head_dim,
            positions=softmax.positions,
        )

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        softmax, path = core(old), core_path(new)
        assert isinstance(softmax, SoftmaxConfig)
        for name, axis in (_AXES | (_OVER_WIDTH if softmax.qk_norm_over == "width" else {})).items():
            if path + name in before:
                size = before[path + name][axis] // after[path + name][axis]
                yield Making(
                    (path + name,), (path + name,), lambda x, axis=axis, size=size: [pooled(x, axis, size, self.num_kv_heads)]
                )


def pooled(x: np.ndarray, axis: int, size: int, groups: int) -> np.ndarray:
    """The means over groups of `size` heads that stand one after another on an axis, in float32."""
    grouped = x.astype(np.float32).reshape(*x.shape[:axis], groups, size, -1, *x.shape[axis + 1 :])
    return grouped.mean(axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

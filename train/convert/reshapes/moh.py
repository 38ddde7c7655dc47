"""Softmax attention to a mixture of its heads, to be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from plait.configs.domains import Counted, Heads, SomeCoefficient, SomeHeads
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, chosen, register, with_mixers

_INNER, _OUTER = "mixer.inner.", "mixer."


@register("moh", source="MoH: Multi-Head Attention as Mixture-of-Head Attention (2410.11842), section 3.4 and its code")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoH(Reshape):
    """Softmax attention whose tokens use the first heads and the best of the others. Heads that are used stay as they are.

    As published for Llama 3: half of the heads are shared, half of the others are used by a token, and the norms of queries choose.
    A learned router begins at zero: all its gates are 1, and the first of the routed heads are used until it has learned.
    """

    num_shared_heads: SomeHeads | None = None
    """Leading heads that every token uses; None gives half of them, or fewer where norms choose, which need three to compare."""
    top_k: Heads | None = None
    """Of the other heads, how many a token uses; None gives half of them, rounded up."""
    router: Literal["query_norm", "learned"] = "query_norm"
    """What chooses: the norms of queries, as the paper goes on from a trained model, or a learned router."""
    balance: SomeCoefficient = 0.01
    """Coefficient of the load-balance loss."""
    layers: tuple[Counted, ...] | None = None
    """Numbers of the layers, with commas; all with softmax attention by default."""

    def model(self, subject: Subject):
        model = subject.model
        plain = lambda mixer: isinstance(mixer, SoftmaxConfig)
        found: dict[int, MixerConfig] = {}
        for index in chosen(model, self.layers, plain, "softmax attention that is no mixture"):
            mixer = model.layer_mixers[index]
            heads = mixer.head_count(model.d_model)
            half = heads // 2 if self.router == "learned" else max(0, min(heads // 2, heads - 3))
            config = MoHConfig(
                mixer=mixer,
                num_shared_heads=half if self.num_shared_heads is None else self.num_shared_heads,
                top_k=self.top_k,
                router=self.router,
                balance=self.balance,
            )
            config.split(heads)
            found[index] = config
        return with_mixers(model, found, "mixture")

    def layer(self, old: MixerConfig, new: MixerConfig, before: Shapes, after: Shapes, index: int) -> Iterator[Making]:
        for path, shape in after.items():
            if path.startswith(_INNER):
                yield Making((_OUTER + path.removeprefix(_INNER),), (path,), lambda x: [x])
            elif path.startswith(_OUTER):
                yield Making((), (path,), lambda shape=shape: [np.zeros(shape, np.float32)])

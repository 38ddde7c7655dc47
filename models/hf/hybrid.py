"""What the families share in which softmax attention stands between layers of another mixer."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from plait.models.config import LMConfig
from plait.models.hf.base import Unfit
from plait.models.hf.decoder import Decoder
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(Decoder, abc.ABC):
    """See `Decoder`. All layers of a kind are alike."""

    def layers(self, values: Values, depth: int, width: int) -> Sequence[MixerConfig]:
        full = self.attends(values, depth)
        attention = dataclasses.replace(self.attention(values, width), positions=self.positions(values, None))
        linear = self.linear(values, width)
        return [attention if attends else linear for attends in full]

    @abc.abstractmethod
    def attends(self, values: Values, depth: int) -> Sequence[bool]:
        """Whether each layer is softmax attention."""

    @abc.abstractmethod
    def linear(self, values: Values, width: int) -> MixerConfig:
        """The mixer of the others."""

    def softmax_layers(self, model: LMConfig) -> list[SoftmaxConfig]:
        found = [mixer for mixer in model.layer_mixers if type(mixer) is SoftmaxConfig]
        if not found:
            raise Unfit("no layer is softmax")
        return found

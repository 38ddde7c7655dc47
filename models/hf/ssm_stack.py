"""What the families of Mamba layers alone share: no channel mixers, the names of the first of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType as Fixed
from typing import Any, ClassVar

from plait.models.config import LMConfig
from plait.models.hf.base import Family
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSMStack(Family, abc.ABC):
    """A family says what its mixer is."""

    base = "backbone."
    around = Fixed({"embeddings.weight": "embedding", "norm_f.weight": "norm.scale"})
    ties: ClassVar[bool]
    """Whether a config that does not say it has a tied head."""

    def model(self, values: Values) -> LMConfig:
        depth, width = values("num_hidden_layers", int), values("hidden_size", int)
        eps = values("layer_norm_epsilon", float, 1e-5)
        values.only("hidden_act", "silu")
        mixer = self.mixer(values, width, eps)
        return LMConfig(
            d_model=width,
            num_layers=depth,
            pattern=mixer.name,
            mixers={mixer.name: mixer},
            channel_mixer=None,
            vocab_size=values("vocab_size", int),
            tie_embeddings=values("tie_word_embeddings", bool, self.ties),
            norm_eps=eps,
        )

    @abc.abstractmethod
    def mixer(self, values: Values, width: int, eps: float) -> MixerConfig:
        """That of every layer; `eps` is of the norms of the stream."""

    def values(self, model: LMConfig) -> dict[str, Any]:
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "num_hidden_layers": model.num_layers,
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            **self.mixer_values(model),
        }

    @abc.abstractmethod
    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        """The fields of the mixer. Raises Unfit where it is another."""

"""What families of Gated DeltaNet with softmax attention between its layers share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit
from plait.models.hf.decoder import Decoder
from plait.models.hf.values import Values
from plait.models.hf.windows import FULL, LINEAR, read_layer_types
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaHybrid(Decoder, abc.ABC):
    """Layers are told apart by `layer_types`; there are some of both kinds."""

    def layers(self, values: Values, depth: int, width: int) -> Sequence[MixerConfig]:
        values.only("hidden_act", "silu", "swish")  # of the convolutions too
        every = values("full_attention_interval", int, 4)
        words = read_layer_types(
            values, depth, [FULL if (index + 1) % every == 0 else LINEAR for index in range(depth)], (FULL, LINEAR)
        )
        if len(set(words)) < 2:
            raise Unfit(f"config.json: layer_types has {words[0]!r} alone, and this family has both {FULL} and {LINEAR}")
        softmax = dataclasses.replace(self.attention(values, width), positions=self.positions(values, None))
        kinds = {FULL: softmax, LINEAR: self.linear(values, width)}
        return [kinds[word] for word in words]

    def linear(self, values: Values, width: int) -> GatedDeltaNetConfig:
        """The mixer of the linear layers."""
        key_dim = values("linear_key_head_dim", int, 128)
        return GatedDeltaNetConfig(
            num_heads=values("linear_num_key_heads", int, 16),
            num_v_heads=values("linear_num_value_heads", int, 32),
            head_dim=key_dim,
            expand_v=expansion(values("linear_value_head_dim", int, 128), key_dim),
            conv_size=values("linear_conv_kernel_dim", int, 4),
            norm_eps=values("rms_norm_eps", float, 1e-6),
        )

    def softmax_layers(self, model: LMConfig) -> list[SoftmaxConfig]:
        for name, mixer in model.mixers.items():
            if type(mixer) not in (SoftmaxConfig, GatedDeltaNetConfig):
                raise Unfit(f"mixers.{name} is {mixer.name}, neither softmax nor gated_deltanet")
        found = [mixer for mixer in model.layer_mixers if isinstance(mixer, SoftmaxConfig)]
        if not found or len(found) == model.num_layers:
            raise Unfit("a model of this family has both softmax and gated_deltanet layers")
        return found

    def own_values(self, model: LMConfig, mixers: Sequence[SoftmaxConfig]) -> Mapping[str, Any]:
        linear = next(mixer for mixer in model.layer_mixers if isinstance(mixer, GatedDeltaNetConfig))
        heads, v_heads = linear.heads(model.d_model)
        return {
            **super().own_values(model, mixers),
            "layer_types": [FULL if isinstance(mixer, SoftmaxConfig) else LINEAR for mixer in model.layer_mixers],
            "linear_num_key_heads": heads,
            "linear_num_value_heads": v_heads,
            "linear_key_head_dim": linear.head_dim,
            "linear_value_head_dim": linear.head_v_dim,
            "linear_conv_kernel_dim": linear.conv_size,
        }

    def mixer_lines(self, mixer: MixerConfig, width: int, layer: Layer) -> Iterator[Line]:
        if not isinstance(mixer, GatedDeltaNetConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        yield from self.linear_lines(mixer, width, layer)
        for name in ("A_log", "dt_bias"):
            yield layer.same(f"linear_attn.{name}", f"mixer.{name}", float32=True)

    @abc.abstractmethod
    def linear_lines(self, mixer: GatedDeltaNetConfig, width: int, layer: Layer) -> Iterator[Line]:
        """Those of a linear layer's projections, convolutions and norm."""

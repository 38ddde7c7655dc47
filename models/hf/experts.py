"""What families with mixtures of experts share: their fields, by names of a family's own, and their tensors, one of each expert."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType as Fixed
from typing import Any, ClassVar, NamedTuple

from plait.models.channel_mixers.base import ChannelMixerConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit
from plait.models.hf.decoder import Decoder, read_activation, write_activation
from plait.models.hf.values import Values

OF_TRAINING = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux")
"""Fields of losses and noise."""


class Key(NamedTuple):
    """A field of a config."""

    name: str
    default: Any
    """Where a file does not say, of the kind that it is."""
    older: str | None = None
    """Its name in other files."""

    def read(self, values: Values) -> Any:
        """Its value. Raises Unfit where it is of another kind."""
        kind = type(self.default)
        return values(self.name, kind, self.default if self.older is None else values(self.older, kind, self.default))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Decoder, abc.ABC):
    """A decoder whose layers have experts, all but some that have one dense MLP. Balancing biases, where there are any, are
    `e_score_correction_bias`; training goes on to move them as DeepSeek-V3 does."""

    keys: ClassVar[Mapping[str, Key]]
    """Fields by those of `MoEConfig`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Fields of `MoEConfig` that are the same in all models of the family."""
    expert_names: ClassVar[Mapping[str, str]] = Fixed(
        {
            "router": "mlp.gate",
            "bias": "mlp.gate.e_score_correction_bias",
            "gate": "mlp.experts.{}.gate_proj",
            "up": "mlp.experts.{}.up_proj",
            "down": "mlp.experts.{}.down_proj",
            "shared": "mlp.shared_experts",
            "shared_gate": "mlp.shared_expert_gate",
        }
    )
    """Names of tensors by those here, `{}` being an expert's number."""

    @abc.abstractmethod
    def dense(self, values: Values, depth: int) -> Sequence[bool]:
        """Which layers have no experts."""

    @abc.abstractmethod
    def dense_values(self, dense: Sequence[bool]) -> Mapping[str, Any]:
        """The fields that say so. Raises Unfit where they cannot."""

    def channel_mixers(self, values: Values, depth: int) -> Sequence[ChannelMixerConfig]:
        dense, experts = self.dense(values, depth), self.experts(values)
        if any(dense):
            mlp = self.channel_mixer(values)
            return [mlp if alone else experts for alone in dense]
        values.passed_over(("intermediate_size", "mlp_bias"))
        return [experts] * depth

    def experts(self, values: Values) -> MoEConfig:
        """Those of a layer."""
        values.passed_over(OF_TRAINING)
        found = {ours: key.read(values) for ours, key in self.keys.items()}
        return MoEConfig(
            **found, **self.options, activation=read_activation(values, self.activation_key, self.default_activation)
        )

    def channel_values(self, model: LMConfig) -> Mapping[str, Any]:
        layers = [model.channel_mixer_of(name) for name in model.layers]
        experts = next((one for one in layers if isinstance(one, MoEConfig)), None)
        if experts is None:
            raise Unfit("no layer has a mixture of experts")
        mlp = next((one for one in layers if isinstance(one, GatedMLPConfig)), None)
        return {
            **({} if mlp is None else {"intermediate_size": mlp.width(model.d_model)}),
            **self.expert_values(experts.settled(model.d_model)),
            **self.dense_values([not isinstance(one, MoEConfig) for one in layers]),
        }

    def expert_values(self, experts: MoEConfig) -> Mapping[str, Any]:
        """The fields of the experts of a layer."""
        found = {key.name: getattr(experts, ours) for ours, key in self.keys.items()}
        return {**found, self.activation_key: write_activation(experts.activation)}

    def channel_lines(self, mlp: ChannelMixerConfig | None, width: int, layer: Layer) -> Iterator[Line]:
        if not isinstance(mlp, MoEConfig):
            yield from super().channel_lines(mlp, width, layer)
            return
        names = self.expert_names
        yield from layer.dense(names["router"], "channel_mixer.router", bias=mlp.router_bias)
        yield from self.routed_lines(mlp, layer)
        if mlp.num_shared_experts:
            for part in ("gate", "up", "down"):
                yield from layer.dense(f"{names['shared']}.{part}_proj", f"channel_mixer.shared.{part}", bias=mlp.use_bias)
        if mlp.shared_gate:
            yield from layer.dense(names["shared_gate"], "channel_mixer.shared_gate")
        if mlp.balance_bias is not None:
            yield layer.same(names["bias"], "channel_mixer.bias", float32=True)

    def routed_lines(self, experts: MoEConfig, layer: Layer) -> Iterator[Line]:
        """Those of the routed experts."""
        for part in ("gate", "up", "down"):
            for index in range(experts.num_experts):
                yield layer.expert(self.expert_names[part].format(index), f"channel_mixer.{part}", index)

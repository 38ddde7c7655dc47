"""What families of multi-head latent attention with experts share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit
from plait.models.hf.experts import Experts
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Fused
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig

OF_LOGITS = ("mscale", "mscale_all_dim")
"""Parameters of YaRN: how much sharper turned channels get, and how much all logits do, by which the first is divided."""


def read_latent_rope(values: Values, *, interleaved: bool, default_theta: float = 10_000.0) -> RotaryConfig:
    """The rotary embedding of latent attention, whose logits are all made sharper and turned channels not.

    Raises:
        Unfit: it makes turned channels alone sharper.
    """
    max_len = values("max_position_embeddings", int, 4096)
    found = read_rope(values, max_len=max_len, default_theta=default_theta, passed_over=OF_LOGITS)
    found = dataclasses.replace(found, interleaved=interleaved)
    if not isinstance(found, YarnRotaryConfig):
        return found
    parameters = values("rope_parameters", dict, values("rope_scaling", dict, {}))
    turned, every = (parameters.get(name) or 0 for name in OF_LOGITS)
    if found.attention_factor != 1 and (found.attention_factor is not None or not every or turned != every):
        raise Unfit(
            f"config.json: mscale={turned} and mscale_all_dim={every} make the channels that are turned sharper than others; "
            "two equal ones can be used"
        )
    return dataclasses.replace(found, mscale=float(every), attention_factor=None) if every else found


def write_latent_rope(positions: RotaryConfig | None, *, interleaved: bool) -> dict[str, Any]:
    """The `rope_parameters` for it."""
    found = write_rope(positions, interleaved=interleaved)
    if isinstance(positions, YarnRotaryConfig) and positions.attention_factor is None:
        found |= dict.fromkeys(OF_LOGITS, positions.mscale)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Experts, abc.ABC):
    """The latents' norms have an epsilon of 1e-6, whatever that of others is."""

    mixer_name: ClassVar[str] = "self_attn"
    """What the tensors of a layer's mixer are under."""
    latent_config: ClassVar[type[MLAConfig]] = MLAConfig
    """What latent attention is here."""
    o_name: ClassVar[str] = "o_proj"
    """The projection from its heads."""

    def layers(self, values: Values, depth: int, width: int) -> Sequence[MixerConfig]:
        return [self.latent(values)] * depth

    @abc.abstractmethod
    def latent_positions(self, values: Values) -> RotaryConfig | None:
        """Of the channels that have positions."""

    def latent(self, values: Values) -> MLAConfig:
        """Latent attention."""
        heads = values("num_attention_heads", int)
        values.only("num_key_value_heads", heads)
        values.only("attention_bias", False)
        values.passed_over(("head_dim", "qk_head_dim"))
        return MLAConfig(
            num_heads=heads,
            kv_rank=values("kv_lora_rank", int, 512),
            q_rank=values("q_lora_rank", int, None),
            nope_head_dim=values("qk_nope_head_dim", int, 128),
            rope_head_dim=values("qk_rope_head_dim", int, 64),
            v_head_dim=values("v_head_dim", int, 128),
            positions=self.latent_positions(values),
        )

    def latent_layers(self, model: LMConfig) -> Sequence[MLAConfig]:
        """The layers of latent attention. Raises Unfit where one is something else that may not be."""
        found = []
        for name, mixer in zip(model.layers, model.layer_mixers, strict=True):
            if type(mixer) is not self.latent_config:
                raise Unfit(f"mixers.{name} is {mixer.name}, not {self.latent_config.name}")
            found.append(mixer)
        return found

    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        mixer = self.latent_layers(model)[0]
        return {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_heads,
            "kv_lora_rank": mixer.kv_rank,
            "q_lora_rank": mixer.q_rank,
            "qk_nope_head_dim": mixer.nope_head_dim,
            "qk_rope_head_dim": mixer.rope_head_dim,
            "v_head_dim": mixer.v_head_dim,
        }

    def mixer_lines(self, mixer: MixerConfig, width: int, layer: Layer) -> Iterator[Line]:
        assert isinstance(mixer, MLAConfig)
        at, heads = self.mixer_name, mixer.num_heads
        if mixer.q_rank is None:
            yield from layer.dense(f"{at}.q_proj", "mixer.q")
        else:
            yield from layer.dense(f"{at}.q_a_proj", "mixer.q_down")
            yield layer.same(f"{at}.q_a_layernorm.weight", "mixer.q_norm.scale")
            yield from layer.dense(f"{at}.q_b_proj", "mixer.q")
        down = Fused((mixer.kv_rank, mixer.rope_head_dim))
        yield from layer.fused(f"{at}.kv_a_proj_with_mqa", ("mixer.kv_down", "mixer.k_rope"), down)
        yield layer.same(f"{at}.kv_a_layernorm.weight", "mixer.kv_norm.scale")
        up = Fused((heads * mixer.nope_head_dim, heads * mixer.v_head_dim), groups=heads)
        yield from layer.fused(f"{at}.kv_b_proj", ("mixer.k_up", "mixer.v_up"), up)
        yield from layer.dense(f"{at}.{self.o_name}", "mixer.o")


def dense_first(values: Values, depth: int, default: int) -> list[bool]:
    """Which layers have no experts, by how many do so before those that do."""
    first = values("first_k_dense_replace", int, default)
    return [index < first for index in range(depth)]


def count_first(dense: Sequence[bool]) -> dict[str, int]:
    """The field for it. Raises Unfit where one stands behind others."""
    first = dense.index(False)
    if any(dense[first:]):
        raise Unfit("a layer without experts stands behind one with them")
    return {"first_k_dense_replace": first}

"""DeepSeek V3.2: DeepSeek V3 whose latent attention sees the tokens that an indexer chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit, register
from plait.models.hf.deepseek_v3 import DeepSeekV3
from plait.models.hf.latent import Latent, dense_first, read_latent_rope, write_latent_rope
from plait.models.hf.transforms import Transposed
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.sparse.dsa import DSAConfig

KINDS = {"dense": True, "sparse": False}
"""Words for the channel mixers of layers, and whether those have no experts."""


@register("deepseek_v32", source="DeepSeek-V3.2 (2512.02556)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV32(DeepSeekV3):
    """See `DeepSeekV3`. The weights of the indexer's heads are float32. The Hadamard rotation of the authors' code, which no product sees, and
    its rounding to 8 bits are not in these models, nor in those of transformers."""

    architecture = "DeepseekV32ForCausalLM"
    mixers = ("dsa",)
    latent_config = DSAConfig
    index_interleaved: ClassVar[bool] = False
    """Whether the pairs that the indexer turns are neighbours."""
    index_heads: ClassVar[int] = 64
    """Its heads where a config does not say."""

    def latent(self, values: Values) -> MLAConfig:
        mla = super().latent(values)
        values.only("layer_types", ["indexed_attention"] * values("num_hidden_layers", int))
        if mla.q_rank is None:
            raise Unfit("config.json: q_lora_rank is missing; an indexer of this family reads the queries' latent")
        return DSAConfig(
            **{field.name: getattr(mla, field.name) for field in dataclasses.fields(mla)},
            top_k=values("index_topk", int, 2048),
            index_heads=values("index_n_heads", int, self.index_heads),
            index_head_dim=values("index_head_dim", int, 128),
            index_interleaved=self.index_interleaved,
        )

    def latent_positions(self, values):
        return read_latent_rope(values, interleaved=True)

    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        mixer = self.latent_layers(model)[0]
        assert isinstance(mixer, DSAConfig)
        return {
            **Latent.mixer_values(self, model),
            "rope_parameters": write_latent_rope(mixer.positions, interleaved=True),
            "index_topk": mixer.top_k,
            "index_n_heads": mixer.index_heads,
            "index_head_dim": mixer.index_head_dim,
            "layer_types": ["indexed_attention"] * model.num_layers,
            self.behind: 0,
        }

    def mixer_lines(self, mixer: MixerConfig, width: int, layer: Layer) -> Iterator[Line]:
        yield from super().mixer_lines(mixer, width, layer)
        at, ours = f"{self.mixer_name}.indexer", "mixer.indexer"
        yield from layer.dense(f"{at}.wq_b", f"{ours}.q")
        yield from layer.dense(f"{at}.wk", f"{ours}.k")
        yield from layer.norm(f"{at}.k_norm", f"{ours}.k_norm")
        yield layer.line(f"{at}.weights_proj.weight", f"{ours}.w", Transposed(), float32=True)

    def dense(self, values: Values, depth: int) -> list[bool]:
        first, words = dense_first(values, depth, 3), values("mlp_layer_types", list, None)
        if words is None:
            return first
        if len(words) != depth or not set(words) <= set(KINDS):
            raise Unfit(f"config.json: mlp_layer_types={words} must be a word of {', '.join(KINDS)} for each of {depth} layers")
        return [KINDS[word] for word in words]

    def dense_values(self, dense: Sequence[bool]) -> dict[str, Any]:
        words, first = {alone: word for word, alone in KINDS.items()}, dense.index(False)
        found = {"mlp_layer_types": [words[alone] for alone in dense]}
        return found if any(dense[first:]) else {"first_k_dense_replace": first, **found}

"""GLM-5: the modules of DeepSeek V3.2, with an indexer that turns neighbouring channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType as Fixed
from typing import Any

from plait.models.config import LMConfig
from plait.models.hf.base import Unfit, register
from plait.models.hf.deepseek_v32 import DeepSeekV32
from plait.models.hf.experts import Key
from plait.models.hf.values import Values
from plait.models.mixers.full.mla import MLAConfig

FULL = "full"
"""The word for a layer with an indexer of its own."""


@register("glm_moe_dsa", source="GLM-5, as transformers 5.24 has it")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmMoeDsa(DeepSeekV32):
    """Layers that attend to what the layer before chose (2603.12201) are refused."""

    architecture = "GlmMoeDsaForCausalLM"
    default_eps = 1e-5
    index_interleaved = True
    index_heads = 32
    keys = Fixed({**DeepSeekV32.keys, "num_groups": Key("n_group", 1), "top_k_groups": Key("topk_group", 1)})

    def latent(self, values: Values) -> MLAConfig:
        words = values("indexer_types", list, None)
        if words is None:
            values.only("index_topk_freq", 1)
            values.only("index_topk_pattern", FULL[0].upper() * values("num_hidden_layers", int))
        elif set(words) != {FULL}:
            raise Unfit(
                f"config.json: indexer_types={words} has layers that share a choice of tokens, which wait for one that travels between "
                f"layers; only {FULL!r} can be used"
            )
        values.passed_over(("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern"))
        values.only("indexer_rope_interleave", True)
        return super().latent(values)

    def mixer_values(self, model: LMConfig) -> Mapping[str, Any]:
        return {**super().mixer_values(model), "indexer_types": [FULL] * model.num_layers}

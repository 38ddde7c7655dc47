"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.mistral import Mistral
from plait.models.hf.rope import read_rope


@register("mixtral", source="Mixtral of Experts (2401.04088)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixtral(Experts, Mistral):
    """See `Experts`."""

    architecture = "MixtralForCausalLM"
    default_eps = 1e-5
    expert_names = Fixed(
        {
            "router": "block_sparse_moe.gate",
            "gate": "block_sparse_moe.experts.{}.w1",
            "up": "block_sparse_moe.experts.{}.w3",
            "down": "block_sparse_moe.experts.{}.w2",
        }
    )
    keys = Fixed(
        {
            "num_experts": Key("num_local_experts", 8, "num_experts"),
            "top_k": Key("num_experts_per_tok", 2),
            "hidden_dim": Key("intermediate_size", 14336),
        }
    )

    def positions(self, values, window):
        return read_rope(values, max_len=values("max_position_embeddings", int, 131_072), default_theta=1_000_000.0)

    def dense(self, values, depth):
        return [False] * depth

    def dense_values(self, dense):
        if any(dense):
            raise Unfit("every layer of this family has experts")
        return {}

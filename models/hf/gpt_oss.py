"""GPT-OSS: windows in every other layer, a sink logit a head, experts with clamped SwiGLU and biases."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType as Fixed

from plait.models.hf.base import Unfit, register
from plait.models.hf.experts import Experts, Key
from plait.models.hf.rope import read_rope
from plait.models.hf.transforms import Interleaved
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows


@register("gpt_oss", source="gpt-oss-120b & gpt-oss-20b Model Card (2508.10925)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTOSS(Experts):
    """See `Experts`. Those of a layer are one tensor, in which gate and up take turns."""

    architecture = "GptOssForCausalLM"
    default_eps = 1e-5
    expert_names = Fixed({"router": "mlp.router"})
    keys = Fixed(
        {
            "num_experts": Key("num_local_experts", 128, "num_experts"),
            "top_k": Key("num_experts_per_tok", 4, "experts_per_token"),
            "hidden_dim": Key("intermediate_size", 2880),
            "swiglu_limit": Key("swiglu_limit", 7.0),
            "swiglu_alpha": Key("swiglu_alpha", 1.702),
        }
    )
    options = Fixed({"use_bias": True, "router_bias": True})

    def stream(self, values, width):
        values.passed_over(("initial_context_length",))
        return {}

    def attention(self, values, width):
        bias = values("attention_bias", bool, True)
        return dataclasses.replace(
            super().attention(values, width), head_dim=values("head_dim", int, 64), qkv_bias=bias, o_bias=bias, sink_logits=True
        )

    def windows(self, values, depth):
        default = [FULL if index % 2 else WINDOW for index in range(depth)]
        return read_windows(values, depth, default, values("sliding_window", int, 128))

    def positions(self, values, window):
        if "rope_parameters" not in values and "rope_scaling" not in values:
            raise Unfit("config.json: rope_parameters is missing, and readers put YaRN in its place; add it")
        return read_rope(values, max_len=values("max_position_embeddings", int, 131_072), default_theta=150_000.0)

    def own_values(self, model, mixers):
        return {**super().own_values(model, mixers), **write_windows([mixer.window_size for mixer in mixers])}

    def dense(self, values, depth):
        return [False] * depth

    def dense_values(self, dense):
        if any(dense):
            raise Unfit("every layer of this family has experts")
        return {}

    def routed_lines(self, experts, layer):
        for theirs, ours in {"": "kernel", "_bias": "bias"}.items():
            parts = tuple(f"channel_mixer.{part}.{ours}" for part in ("gate", "up"))
            yield layer.line(f"mlp.experts.gate_up_proj{theirs}", parts, Interleaved())
            yield layer.same(f"mlp.experts.down_proj{theirs}", f"channel_mixer.down.{ours}")

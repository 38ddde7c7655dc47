"""Qwen 3.5, dense: Gated DeltaNet in three of four layers, gated attention of which a quarter of each head is turned, norms of 1 + weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plait.models.hf.base import Layer, Line, register
from plait.models.hf.delta_hybrid import DeltaHybrid
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Fused, FusedTaps

OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""How the channels that are turned are shared among the axes of an image; all are one in text."""


@register("qwen3_5_text", source="Qwen3.5 (Qwen, 2026); Gated Attention (2505.06708)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35(DeltaHybrid):
    """See `Decoder`. Heads that predict tokens further ahead (`mtp`) are left out."""

    architecture = "Qwen3_5ForCausalLM"
    mixers = ("gated_deltanet", "softmax")
    ignored = ("mtp.*",)

    def stream(self, values, width):
        values.only("attn_output_gate", True)
        values.only("output_gate_type", "swish", "silu")  # of the linear layers
        values.passed_over(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"))
        return {"norm_kind": "rms_1p"}

    def attention(self, values, width):
        values.only("attention_bias", False)  # it would be the gate's too
        eps = values("rms_norm_eps", float, 1e-6)
        head_dim = values("head_dim", int, 256)
        return dataclasses.replace(
            super().attention(values, width), head_dim=head_dim, gate="elementwise", qk_norm=True, qk_norm_eps=eps
        )

    def positions(self, values, window):
        max_len = values("max_position_embeddings", int, 32_768)
        return read_rope(values, max_len=max_len, default_fraction=0.25, passed_over=OF_IMAGES)

    def rope(self, mixers):
        return {"partial_rotary_factor": 1.0, **write_rope(mixers[0].positions)}

    def query_lines(self, mixer, width, layer):
        heads, _ = mixer.heads(width)
        yield from layer.fused("self_attn.q_proj", ("mixer.q", "mixer.gate"), Fused((heads * mixer.head_dim,) * 2, groups=heads))

    def linear_lines(self, mixer, width, layer):
        heads, v_heads = mixer.heads(width)
        sizes = (heads * mixer.head_dim, heads * mixer.head_dim, v_heads * mixer.head_v_dim)
        yield from self.input_lines(sizes, heads, v_heads, layer)
        yield layer.line("linear_attn.conv1d.weight", tuple(f"mixer.{name}_conv.weight" for name in "qkv"), FusedTaps(sizes))
        yield layer.same("linear_attn.norm.weight", "mixer.norm.scale")
        yield from layer.dense("linear_attn.out_proj", "mixer.o")

    def input_lines(self, sizes: tuple[int, int, int], groups: int, v_heads: int, layer: Layer) -> Iterator[Line]:
        """Those of the projections of the layer's input, q, k and v of such `sizes`."""
        yield from layer.fused("linear_attn.in_proj_qkv", ("mixer.q", "mixer.k", "mixer.v"), Fused(sizes))
        for theirs, ours in {"z": "gate", "a": "a", "b": "b"}.items():
            yield from layer.dense(f"linear_attn.in_proj_{theirs}", f"mixer.{ours}")

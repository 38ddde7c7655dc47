"""MiniMax-01: lightning attention, softmax attention in every eighth layer, experts; the stream is what the norms give."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import Unfit, register
from plait.models.hf.mixtral import Mixtral
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Fused
from plait.models.hf.windows import FULL, LINEAR, read_layer_types
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.lightning import LightningConfig

HALVES = ("full_attn", "linear_attn", "mlp")
"""The parts of a model whose factors are fields of their own."""


@register("minimax", source="MiniMax-01: Scaling Foundation Models with Lightning Attention (2501.08313)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniMax(Mixtral):
    """See `Experts`. `rotary_dim` says how many channels of a head are turned, as in MiniMax's own code; transformers 5.24 turns all."""

    architecture = "MiniMaxForCausalLM"
    mixers = ("lightning", "softmax")
    ignored = tuple(f"model.layers.*.self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"))

    def stream(self, values, width):
        values.only("postnorm", True)
        values.only("shared_intermediate_size", 0)
        values.passed_over(("block_size", "shared_moe_mode"))
        alpha, beta = ({values(f"{half}_{name}_factor", float, 1.0) for half in HALVES} for name in ("alpha", "beta"))
        if len(alpha) > 1 or len(beta) > 1:
            raise Unfit(
                f"config.json: alpha factors of {sorted(alpha)} and beta factors of {sorted(beta)}: one of each can be used, for "
                "attention and experts alike"
            )
        scale = lambda factor: None if factor == 1 else factor
        return {"norm": "input", "stream_scale": scale(alpha.pop()), "residual_scale": scale(beta.pop())}

    def layers(self, values, depth, width):
        values.only("sliding_window")
        values.only("hidden_act", "silu", "swish")  # of lightning attention too
        softmax = dataclasses.replace(self.attention(values, width), positions=self.positions(values, None))
        lightning = LightningConfig(num_heads=softmax.num_heads, head_dim=softmax.head_dim)
        default = [LINEAR if index % 2 else FULL for index in range(depth)]
        words = read_layer_types(values, depth, default, (FULL, LINEAR))
        return [softmax if word == FULL else lightning for word in words]

    def positions(self, values, window):
        heads, width = values("num_attention_heads", int), values("hidden_size", int)
        head_dim = values("head_dim", int, width // heads)
        return read_rope(
            values,
            max_len=values("max_position_embeddings", int, 131_072),
            default_theta=1_000_000.0,
            default_fraction=values("rotary_dim", int, head_dim) / head_dim,
        )

    def softmax_layers(self, model):
        for name, mixer in model.mixers.items():
            if type(mixer) not in (SoftmaxConfig, LightningConfig):
                raise Unfit(f"mixers.{name} is {mixer.name}, neither softmax nor lightning")
        found = [mixer for mixer in model.layer_mixers if isinstance(mixer, SoftmaxConfig)]
        if not found:
            raise Unfit("a model of this family has softmax layers")
        return found

    def rope(self, mixers):
        return {key: value for key, value in write_rope(mixers[0].positions).items() if key != "partial_rotary_factor"}

    def own_values(self, model, mixers):
        turned = (
            {} if mixers[0].positions.fraction == 1 else {"rotary_dim": int(mixers[0].positions.fraction * mixers[0].head_dim)}
        )
        factors = {"alpha": model.stream_scale or 1, "beta": model.residual_scale or 1}
        return {
            **turned,
            **{f"{half}_{name}_factor": value for half in HALVES for name, value in factors.items()},
            "layer_types": [FULL if isinstance(mixer, SoftmaxConfig) else LINEAR for mixer in model.layer_mixers],
            "sliding_window": None,
        }

    def mixer_lines(self, mixer, width, layer):
        if not isinstance(mixer, LightningConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        heads = mixer.heads(width)
        fused = Fused((heads * mixer.head_dim,) * 3, groups=heads)
        yield from layer.fused("self_attn.qkv_proj", ("mixer.q", "mixer.k", "mixer.v"), fused)
        yield from layer.dense("self_attn.output_gate", "mixer.gate")
        yield layer.same("self_attn.norm.weight", "mixer.norm.scale")
        yield from layer.dense("self_attn.out_proj", "mixer.o")

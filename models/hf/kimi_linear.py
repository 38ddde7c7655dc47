"""Kimi Linear: Kimi delta attention, latent attention without positions in every fourth layer, experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType as Fixed
from typing import ClassVar

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit, register
from plait.models.hf.experts import Key
from plait.models.hf.latent import Latent, dense_first
from plait.models.hf.transforms import Taps, Widened
from plait.models.hf.values import Values
from plait.models.hf.windows import FULL, LINEAR, read_layer_types
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.linear.kda import KDAConfig

DENSE, SPARSE = "dense", "sparse"
"""Words of `mlp_layer_types`."""


@register("kimi_linear", source="Kimi Linear (2510.26692)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinear(Latent):
    """See `Experts`. Published files have the fields of linear layers in `linear_attn_config`, and their dense layer under `mlp`."""

    architecture = "KimiLinearForCausalLM"
    mixers = ("kda", "mla")
    behind = "num_nextn_predict_layers"
    renamed = Fixed({"mlp": "block_sparse_moe"})
    default_eps = 1e-5
    mlp_names: ClassVar[Mapping[str, str]] = Fixed({part: f"block_sparse_moe.{part}_proj" for part in ("gate", "up", "down")})
    expert_names = Fixed(
        {
            "router": "block_sparse_moe.gate",
            "bias": "block_sparse_moe.gate.e_score_correction_bias",
            "gate": "block_sparse_moe.experts.{}.w1",
            "up": "block_sparse_moe.experts.{}.w3",
            "down": "block_sparse_moe.experts.{}.w2",
            "shared": "block_sparse_moe.shared_experts",
        }
    )
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 256, "num_local_experts"),
            "top_k": Key("num_experts_per_token", 8, "num_experts_per_tok"),
            "hidden_dim": Key("moe_intermediate_size", 1024),
            "num_shared_experts": Key("num_shared_experts", 1, "n_shared_experts"),
            "num_groups": Key("num_expert_group", 1, "n_group"),
            "top_k_groups": Key("topk_group", 1),
            "normalize": Key("moe_renormalize", True, "norm_topk_prob"),
            "routed_scale": Key("routed_scaling_factor", 2.446),
        }
    )
    options = Fixed({"scores": "sigmoid", "balance_bias": 0.001})

    def stream(self, values, width):
        values.only("hidden_act", "silu", "swish")  # of the convolutions too
        values.only("moe_router_activation_func", "sigmoid")
        values.only("moe_layer_freq", 1)
        values.only("mla_use_nope", True)
        values.passed_over((self.behind, "model_max_length", "use_grouped_topk", "rope_theta", "rope_parameters", "rope_scaling"))
        return {}

    def layers(self, values, depth, width):
        latent, delta = self.latent(values), self.delta(values)
        words = read_layer_types(values, depth, self.default_types(values, depth), (FULL, LINEAR))
        return [latent if word == FULL else delta for word in words]

    def default_types(self, values: Values, depth: int) -> list[str]:
        """The word of each layer where the config has none."""
        own = Values(values("linear_attn_config", dict, {}))
        full = own("full_attn_layers", list, [index + 1 for index in range(1, depth) if index % 4 == 0])
        return [FULL if index + 1 in full else LINEAR for index in range(depth)]

    def latent_positions(self, values):
        return None

    def delta(self, values: Values) -> KDAConfig:
        """The mixer of the linear layers."""
        own = Values(values("linear_attn_config", dict, {}))
        own.passed_over(("full_attn_layers", "kda_layers"))
        field = lambda name, newer, default: own(name, int, values(newer, int, default))
        found = KDAConfig(
            num_heads=field("num_heads", "linear_num_heads", 32),
            head_dim=field("head_dim", "linear_head_dim", 128),
            conv_size=field("short_conv_kernel_size", "linear_conv_kernel_dim", 4),
            gate_bias=False,
            norm_eps=values("rms_norm_eps", float, self.default_eps),
        )
        own.finish()
        return found

    def latent_layers(self, model):
        for name, mixer in model.mixers.items():
            if not isinstance(mixer, MLAConfig | KDAConfig):
                raise Unfit(f"mixers.{name} is {mixer.name}, neither mla nor kda")
        found = [mixer for mixer in model.layer_mixers if isinstance(mixer, MLAConfig)]
        if not found or len(found) == model.num_layers:
            raise Unfit("a model of this family has both mla and kda layers")
        return found

    def mixer_values(self, model):
        latent, delta = super().mixer_values(model), self.delta_of(model)
        words = [FULL if isinstance(mixer, MLAConfig) else LINEAR for mixer in model.layer_mixers]
        of = lambda wanted: [index + 1 for index, word in enumerate(words) if word == wanted]
        own = {"num_heads": delta.heads(model.d_model), "head_dim": delta.head_dim, "short_conv_kernel_size": delta.conv_size}
        return {
            **latent,
            "layer_types": words,
            "linear_num_heads": own["num_heads"],
            "linear_head_dim": delta.head_dim,
            "linear_conv_kernel_dim": delta.conv_size,
            "linear_attn_config": {**own, "full_attn_layers": of(FULL), "kda_layers": of(LINEAR)},
            self.behind: 0,
        }

    @staticmethod
    def delta_of(model: LMConfig) -> KDAConfig:
        """The mixer of the linear layers, of which there are some."""
        return next(mixer for mixer in model.layer_mixers if isinstance(mixer, KDAConfig))

    def dense(self, values, depth):
        words = [DENSE if alone else SPARSE for alone in dense_first(values, depth, self.default_dense)]
        words = values("mlp_layer_types", list, words)
        if len(words) != depth or not set(words) <= {DENSE, SPARSE}:
            raise Unfit(
                f"config.json: mlp_layer_types={words} must be {DENSE!r} or {SPARSE!r} for each of {depth} layers; restore it"
            )
        return [word == DENSE for word in words]

    default_dense = 1
    """Leading layers without experts where the config does not say."""

    def dense_values(self, dense: Sequence[bool]):
        words = [DENSE if alone else SPARSE for alone in dense]
        return {"mlp_layer_types": words, "first_k_dense_replace": dense.index(False)}

    def mixer_lines(self, mixer, width, layer):
        if not isinstance(mixer, KDAConfig):
            yield from super().mixer_lines(mixer, width, layer)
            return
        at = self.mixer_name
        for name in "qkv":
            yield from layer.dense(f"{at}.{name}_proj", f"mixer.{name}")
            yield layer.line(f"{at}.{name}_conv1d.weight", f"mixer.{name}_conv.weight", Taps())
        yield from layer.dense(f"{at}.b_proj", "mixer.b")
        yield from self.gate_lines(layer)
        yield layer.same(f"{at}.dt_bias", "mixer.dt_bias", float32=True)
        yield layer.same(f"{at}.o_norm.weight", "mixer.norm.scale")
        yield from layer.dense(f"{at}.{self.o_name}", "mixer.o")

    def gate_lines(self, layer: Layer) -> Iterator[Line]:
        """Those of decay and output gate."""
        for theirs, ours in {"f": "f", "g": "gate"}.items():
            yield from layer.dense(f"{self.mixer_name}.{theirs}_a_proj", f"mixer.{ours}.down")
            yield from layer.dense(f"{self.mixer_name}.{theirs}_b_proj", f"mixer.{ours}.up")
        yield layer.line(f"{self.mixer_name}.A_log", "mixer.A_log", Widened(2, 1), float32=True)

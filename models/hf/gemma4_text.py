"""Gemma 4, text: other heads in layers without a window, values by a norm, scaled layers; some with experts, or inputs of each layer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType as Fixed
from typing import Any

from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.hf.base import Line, Unfit, register
from plait.models.hf.decoder import read_activation, write_activation
from plait.models.hf.experts import Experts, Key
from plait.models.hf.gemma2 import Gemma2
from plait.models.hf.places import Place
from plait.models.hf.rope import read_rope, write_rope
from plait.models.hf.transforms import Halves, Same, Transposed
from plait.models.hf.values import Values
from plait.models.hf.windows import FULL, WINDOW, read_windows, write_windows
from plait.models.layers.layer_inputs import LayerInputsConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_proportional import ProportionalRotaryConfig

PER_LAYER = {
    "per_layer_input_gate.weight": ("layer_gate.gate.kernel", Transposed()),
    "per_layer_projection.weight": ("layer_gate.out.kernel", Transposed()),
    "post_per_layer_input_norm.weight": ("layer_gate.norm.scale", Same()),
}
OUTSIDE = {
    "embed_tokens_per_layer.weight": ("layer_inputs.embedding", Same()),
    "per_layer_model_projection.weight": ("layer_inputs.projection.kernel", Transposed()),
    "per_layer_projection_norm.weight": ("layer_inputs.norm.scale", Same()),
}
"""Of models with inputs of each layer's own: names there, places here, and transforms."""
EXPERTS = {
    "pre_feedforward_layernorm": "shared_norm",
    "post_feedforward_layernorm_1": "shared_out_norm",
    "pre_feedforward_layernorm_2": "routed_norm",
    "post_feedforward_layernorm_2": "routed_out_norm",
}
"""Norms around the MLP that all tokens use and around the experts: names there, and here."""


@register("gemma4_text", source="Gemma 4 (Google DeepMind, 2026)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Text(Experts):
    """See `Decoder`. Norms multiply by the weight; the scalar of a layer, which `transformers` keeps fixed, is trained here."""

    architecture = "Gemma4ForCausalLM"
    ties = True
    activation_key = "hidden_activation"
    default_activation = "gelu_pytorch_tanh"
    block = Fixed({theirs: ours for theirs, ours in Gemma2.block.items() if ours != "channel_norm.scale"})
    keys = Fixed(
        {
            "num_experts": Key("num_experts", 128),
            "top_k": Key("top_k_experts", 8),
            "hidden_dim": Key("moe_intermediate_size", 704),
            "shared_hidden_dim": Key("intermediate_size", 2112),
        }
    )
    options = Fixed({"num_shared_experts": 1, "own_norms": True, "expert_scales": True})

    def stream(self, values, width):
        values.only("use_bidirectional_attention", "vision")  # which text is not
        dim = values.or_null("hidden_size_per_layer_input", int, 256) or None
        size = values("vocab_size_per_layer_input", int, 262_144)
        if dim is not None and size != values("vocab_size", int):
            raise Unfit(
                f"config.json: vocab_size_per_layer_input={size} is not supported beside vocab_size={values('vocab_size', int)}; one size "
                "can be used for both"
            )
        activation = read_activation(values, self.activation_key, self.default_activation)
        return {
            "norm": "both",
            "embedding_scale": width**0.5,
            "logit_soft_cap": values.or_null("final_logit_softcapping", float, None),
            "layer_scalars": True,
            "layer_inputs": LayerInputsConfig() if dim is None else LayerInputsConfig(dim=dim, activation=activation),
        }

    def attention(self, values, width):
        return dataclasses.replace(
            super().attention(values, width),
            num_kv_heads=values("num_key_value_heads", int, 4),
            head_dim=values("head_dim", int, 256),
            scale=1.0,
            qk_norm=True,
            qk_norm_eps=values("rms_norm_eps", float, 1e-6),
            value_norm=True,
        )

    def windows(self, values, depth):
        default = [WINDOW if (index + 1) % 6 else FULL for index in range(depth)]
        return [*read_windows(values, depth, default, values("sliding_window", int, 512))[:-1], None]

    def positions(self, values, window):
        if values("rope_parameters", dict, None) is None:
            return ProportionalRotaryConfig(theta=1e6) if window is None else RotaryConfig()
        return read_rope(values, max_len=values("max_position_embeddings", int, 131_072), key=FULL if window is None else WINDOW)

    def layers(self, values, depth, width):
        mixer, tied, windows = self.attention(values, width), values("attention_k_eq_v", bool, False), self.windows(values, depth)
        found = [
            dataclasses.replace(
                mixer, window_size=window, positions=self.positions(values, window), tie_kv=tied and window is None, **heads
            )
            for window, heads in zip(windows, _heads(values, windows), strict=True)
        ]
        first = depth - _readers(values, depth)
        if first == depth:
            return found
        kinds = [mixer.window_size for mixer in found]
        if set(kinds[first:]) - set(kinds[:first]):
            raise Unfit(
                f"config.json: num_kv_shared_layers={depth - first} leaves no layer before them for each kind in layer_types"
            )
        writers = {len(kinds[:first]) - 1 - kinds[:first][::-1].index(kind) for kind in set(kinds[first:])}
        for index in writers:
            found[index] = dataclasses.replace(found[index], shared_kv="write")
        read = {"shared_kv": "read", "value_norm": False, "tie_kv": False}
        return found[:first] + [dataclasses.replace(mixer, **read) for mixer in found[first:]]

    def channel_mixers(self, values, depth):
        if values("enable_moe_block", bool, False):
            own, field = self.experts(values), "shared_hidden_dim"
        else:
            own, field = self.channel_mixer(values), "hidden_dim"
            values.passed_over(("num_experts", "top_k_experts", "moe_intermediate_size"))
        readers = _readers(values, depth) if values("use_double_wide_mlp", bool, False) else 0
        return [own] * (depth - readers) + [dataclasses.replace(own, **{field: 2 * getattr(own, field)})] * readers

    def experts(self, values):
        return dataclasses.replace(super().experts(values), norm_eps=values("rms_norm_eps", float, 1e-6))

    def dense(self, values, depth):
        return [False] * depth

    def dense_values(self, dense):
        return {}

    def channel_values(self, model):
        first, last = (model.channel_mixer_of(model.layers[index]) for index in (0, -1))
        if isinstance(first, MoEConfig):
            own = self.expert_values(first.settled(model.d_model))
        elif isinstance(first, GatedMLPConfig):
            own = {"intermediate_size": first.width(model.d_model), self.activation_key: write_activation(first.activation)}
        else:
            raise Unfit(f"channel_mixer={getattr(first, 'name', None)!r} is neither a gated MLP nor experts beside one")
        return {**own, "enable_moe_block": isinstance(first, MoEConfig), "use_double_wide_mlp": first != last}

    def rope(self, mixers):
        return {WINDOW if mixer.window_size else FULL: write_rope(mixer.positions) for mixer in mixers}

    def own_values(self, model, mixers):
        local = next((mixer for mixer in mixers if mixer.window_size is not None), mixers[0])
        whole, dim = mixers[-1], model.layer_inputs.dim
        tied = any(mixer.tie_kv for mixer in mixers)
        return {
            **super().own_values(model, mixers),
            **{key: value for key, value in write_windows([mixer.window_size for mixer in mixers]).items() if value is not None},
            "num_key_value_heads": local.heads(model.d_model)[1],
            "head_dim": local.head_dim,
            "global_head_dim": whole.head_dim,
            "num_global_key_value_heads": whole.heads(model.d_model)[1] if tied else None,
            "attention_k_eq_v": tied,
            "num_kv_shared_layers": sum(mixer.shared_kv == "read" for mixer in mixers),
            "hidden_size_per_layer_input": dim or 0,
            **({} if dim is None else {"vocab_size_per_layer_input": model.vocab_size}),
            "final_logit_softcapping": model.logit_soft_cap,
        }

    def outside(self, model):
        yield from super().outside(model)
        for name, (path, transform) in OUTSIDE.items() if model.layer_inputs.dim is not None else ():
            yield Line((self.base + name,), (Place(path),), transform)

    def layer(self, model, index, layer):
        yield from super().layer(model, index, layer)
        yield layer.same("layer_scalar", "scalar")
        for name, (path, transform) in PER_LAYER.items() if model.layer_inputs.dim is not None else ():
            yield layer.line(name, path, transform)

    def channel_lines(self, mlp, width, layer):
        if isinstance(mlp, GatedMLPConfig):
            yield from super().channel_lines(mlp, width, layer)
            yield layer.same("pre_feedforward_layernorm.weight", "channel_norm.scale")
            return
        for ours, theirs in self.mlp_names.items():
            yield from layer.dense(theirs, f"channel_mixer.shared.{ours}")
        yield from layer.dense("router.proj", "channel_mixer.router")
        yield layer.same("router.scale", "channel_mixer.router_norm.scale")
        yield layer.same("router.per_expert_scale", "channel_mixer.expert_scale")
        yield layer.line("experts.gate_up_proj", ("channel_mixer.gate.kernel", "channel_mixer.up.kernel"), Halves())
        yield layer.line("experts.down_proj", "channel_mixer.down.kernel", Transposed())
        for theirs, ours in EXPERTS.items():
            yield layer.same(f"{theirs}.weight", f"channel_mixer.{ours}.scale")

    def unread(self, model):
        own = [index for index, mixer in enumerate(model.layer_mixers) if getattr(mixer, "shared_kv", None) == "read"]
        return tuple(
            f"model.layers.{index}.self_attn.{name}.*" for index in own for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        )


def _readers(values: Values, depth: int) -> int:
    """The last layers, which read keys and values of layers before them. Raises Unfit where no layer is left that has any."""
    count = values("num_kv_shared_layers", int, 0)
    if not 0 <= count < depth:
        raise Unfit(f"config.json: num_kv_shared_layers={count} must be below num_hidden_layers={depth}")
    return count


def _heads(values: Values, windows: Sequence[int | None]) -> list[Mapping[str, Any]]:
    """What each layer's heads have of their own: by `per_layer_config`, or by fields of the layers without a window."""
    whole: dict[str, Any] = {"head_dim": values("global_head_dim", int, 512)}
    heads = values("num_global_key_value_heads", int, None)
    if heads is not None and values("attention_k_eq_v", bool, False):
        whole["num_kv_heads"] = heads
    given = values("per_layer_config", dict, None)
    if given is None:
        return [whole if window is None else {} for window in windows]
    return [dict(_own(given.get(str(index), {}))) for index in range(len(windows))]


def _own(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    values = Values(fields, "config.json: per_layer_config")
    for ours, theirs in {"head_dim": "head_dim", "num_kv_heads": "num_key_value_heads"}.items():
        if (value := values(theirs, int, None)) is not None:
            yield ours, value
    values.finish()

"""DiffLlama: Llama with differential attention, whose output norm has no gain."""

from __future__ import annotations

import dataclasses

from plait.models.hf.base import Line, Unfit, register
from plait.models.hf.decoder import Decoder
from plait.models.hf.places import Place
from plait.models.hf.rope import write_rope
from plait.models.hf.transforms import Alternated, Same
from plait.models.mixers.full.diff import DiffConfig


@register("diffllama", source="Differential Transformer (2410.05258); transformers: DiffLlama")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffLlama(Decoder):
    """See `Decoder`. The maps of all heads that are taken from come after those that they are taken from; here they alternate."""

    architecture = "DiffLlamaForCausalLM"
    mixers = ("diff",)

    def layers(self, values, depth, width):
        values.passed_over(("lambda_std_dev",))
        values.only("attention_bias", False)
        (window,) = set(self.windows(values, depth))
        maps = self.attention(values, width)
        heads, kv_heads = maps.heads(width)
        if heads % 2 or kv_heads % 2:
            raise Unfit(
                f"config.json: num_attention_heads={heads} and num_key_value_heads={kv_heads} must be even, as a head has two maps; "
                "restore the file"
            )
        mixer = DiffConfig(
            num_heads=heads // 2,
            num_kv_heads=kv_heads // 2,
            head_dim=maps.head_dim,
            positions=self.positions(values, window),
            norm_eps=values("rms_norm_eps", float, 1e-5),
            norm_scale=False,
        )
        return [mixer] * depth

    def mixer_values(self, model):
        mixer = model.layer_mixers[0]
        if not isinstance(mixer, DiffConfig):
            raise Unfit(f"mixers.{model.layers[0]} is {mixer.name}, not diff")
        heads, kv_heads = mixer.heads(model.d_model)
        return {
            "num_attention_heads": 2 * heads,
            "num_key_value_heads": 2 * kv_heads,
            "head_dim": mixer.head_dim,
            "rope_parameters": write_rope(mixer.positions),
        }

    def mixer_lines(self, mixer, width, layer):
        heads, kv_heads = mixer.heads(width)
        for name, number in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
            yield layer.line(f"{self.attention_names[name]}.weight", f"mixer.{name}.kernel", Alternated(number))
        yield from layer.dense(self.attention_names["o"], "mixer.o")
        for index in range(2):
            for side, name in enumerate("qk"):
                place = Place(f"{layer.place.path}.mixer.vectors", (*layer.place.index, index, side))
                yield Line((f"{layer.prefix}self_attn.lambda_{name}{index + 1}",), (place,), Same())

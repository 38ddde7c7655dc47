"""What llama.cpp's names and metadata are in the families here: the config, and a tensor for each tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from plait.models.hf.base import Unfit
from plait.models.hf.rope import write_rope
from plait.models.hf.values import Values
from plait.models.positions.rope import frequencies
from plait.models.positions.rotary_llama3 import Llama3RotaryConfig
from plait.train.convert.gguf.file import GGUFFile
from plait.train.convert.weights import ConvertError


class Architecture(NamedTuple):
    """How llama.cpp keeps the models of a family."""

    model_type: str
    pairs: bool
    """Whether rows of queries and keys that turn together stand beside each other, and not half a head apart."""


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),
    "qwen2": Architecture("qwen2", pairs=False),
    "qwen3": Architecture("qwen3", pairs=False),
}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Tokens that configs name, and what they are called in the metadata."""
FREQUENCIES = "rope_freqs.weight"
"""By what Llama 3.1 divides the frequencies of its rotary embedding; no weight."""


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises ConvertError for one that is not known here."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConvertError(
            f"{file.path} has general.architecture={name!r}, and {', '.join(ARCHITECTURES)} can be read; give the model's safetensors"
        )
    return ARCHITECTURES[name]


def tensor_name(name: str) -> str:
    """The family's name of a tensor; a name that is none stays, to be listed as such."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, stem, kind = match.groups()
    table = _OUTSIDE if layer is None else _INSIDE
    if stem not in table:
        return name
    return f"{table[stem]}.{kind}" if layer is None else f"model.layers.{int(layer)}.{table[stem]}.{kind}"


def config_of(file: GGUFFile, divisors: np.ndarray | None) -> dict[str, Any]:
    """The fields of a `config.json` of the family.

    Args:
        divisors: the tensor `FREQUENCIES`, where there is one.

    Raises:
        Unfit: the metadata lack something, or say what cannot be done here.
    """
    prefix = f"{file.metadata['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    values = Values(own, where=file.path.name)
    shapes = {entry.name: entry.shape for entry in file.entries}
    width, heads, depth = (values(key, int) for key in ("embedding_length", "attention.head_count", "block_count"))
    if depth > len(shapes):
        raise Unfit(f"{file.path.name}: block_count={depth} and there are {len(shapes)} tensors; download it again")
    if heads < 1:
        raise Unfit(f"{file.path.name}: attention.head_count={heads}; download it again")
    head_dim = values("attention.key_length", int, values("rope.dimension_count", int, width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        values.only(key, head_dim)
    values.only("attention.causal", True)
    values.only("expert_count", 0)
    values.passed_over(("vocab_size", "rope.scaling.finetuned", "expert_used_count"))
    max_len = values("context_length", int)
    fields = {
        "model_type": architecture_of(file).model_type,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0] or values("vocab_size", int),
        "hidden_size": width,
        "intermediate_size": values("feed_forward_length", int),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": values("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": values("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": max_len,
        "rope_parameters": _rope(values, divisors, head_dim),
        "attention_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        **{
            f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ENDS.items() if name != "unk"
        },
    }
    values.finish()
    if dtype := _dtype({entry.type.name for entry in file.entries}):
        fields["dtype"] = dtype
    return fields


def _dtype(types: set[str]) -> str | None:
    """That of the weights, as configs name it: norms are float32 beside weights of half the size; None for quantised ones."""
    names = {"F16": "float16", "BF16": "bfloat16"}
    found = [name for kind, name in names.items() if types <= {kind, "F32"}]
    return "float32" if len(found) == len(names) else next(iter(found), None)


def _rope(values: Values, divisors: np.ndarray | None, head_dim: int) -> Mapping[str, Any]:
    theta = values("rope.freq_base", float, 10_000.0)
    if divisors is not None:
        return write_rope(_llama3(divisors, theta, head_dim))
    kind = values("rope.scaling.type", str, "none")
    factor = values("rope.scaling.factor", float, values("rope.scale_linear", float, 1.0))
    found: dict[str, Any] = {"rope_theta": theta, "rope_type": "default" if kind == "none" or factor == 1 else kind}
    if found["rope_type"] != "default":
        found["factor"] = factor
    if (original := values("rope.scaling.original_context_length", int, None)) is not None:
        found["original_max_position_embeddings"] = original
    return found


def _llama3(divisors: np.ndarray, theta: float, head_dim: int) -> Llama3RotaryConfig:
    """The scaling that Llama 3.1 and later published with, whose factor these divisors show. Raises Unfit where they are another's."""
    scaling = Llama3RotaryConfig(theta=theta, factor=float(np.max(divisors, initial=1.0)), original_len=8192)
    expected = frequencies(head_dim, theta) / scaling.frequencies(head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise Unfit(
            f"{FREQUENCIES} is not that of Llama 3.1 or 3.2, and which scaling it is cannot be told; import the model's safetensors"
        )
    return scaling

"""Writes small GGUF files, right ones and such as nobody should."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from plait.data.tokenizers.tokenizer import BYTE_CHARS

TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(content: Any) -> bytes:
    """With its type before it."""
    match content:
        case bool():
            return struct.pack("<I?", 7, content)
        case int():
            return struct.pack("<II", 4, content)
        case float():
            return struct.pack("<If", 6, content)
        case str():
            return struct.pack("<I", 8) + text(content)
        case list():
            parts = [value(one) for one in content]
            return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)
    raise TypeError(content)


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A file; a tensor is an array, or its type, shape and bytes."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + value(content) for key, content in metadata.items())
    data = b""
    for name, tensor in tensors.items():
        kind, shape, content = tensor if isinstance(tensor, tuple) else (TYPES[tensor.dtype.name], tensor.shape, tensor.tobytes())
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += content + bytes(-len(content) % 32)
    return header + bytes(-len(header) % 32) + data


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp keeps those of a Llama."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def named(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a published model as llama.cpp names and lays them."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        layer, prefix = stem, ""
        if stem.startswith("model.layers."):
            _, _, index, layer = stem.split(".", 3)
            prefix = f"blk.{index}."
        if config["model_type"] == "llama" and layer in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in layer else "num_key_value_heads"]
            found[f"{prefix}{STEMS[layer]}.{kind}"] = in_pairs(tensor, heads)
        else:
            found[f"{prefix}{STEMS[layer]}.{kind}"] = tensor
    return found


def described(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The metadata of a model by its published config."""
    name = config["model_type"]
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    return {"general.architecture": name, **{f"{name}.{key}": one for key, one in (fields | more).items()}}


SPECIAL = ["<|end|>", "<|start|>", "<think>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


def byte_level(**more: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer of 263 tokens, the last of which is added by the user."""
    names = [*SPECIAL[:2], *BYTE_CHARS, *(merge.replace(" ", "") for merge in MERGES), SPECIAL[2]]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": names,
        "token_type": [3, 3, *[1] * (len(names) - 3), 4],
        "merges": MERGES,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": one for key, one in (fields | more).items()} | {"tokenizer.chat_template": "{{ messages }}"}


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    path.write_bytes(gguf(metadata, tensors))
    return path

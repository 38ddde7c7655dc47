"""Golden outputs and gradients of the attention layers of `transformers`, for the options and positions of full attention:
`python tests/models/golden/generate_soft.py` writes the .npz files beside it. See `generate.py` for what a file holds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, WIDTH = 2, 19, 24
Arrays = dict[str, np.ndarray]
GROUPED = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_implementation": "eager",
}


def hidden(seed: int) -> np.ndarray:
    return np.random.RandomState(seed + 1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def cotangent(seed: int) -> np.ndarray:
    """What the output is multiplied by before it is summed and differentiated."""
    return np.random.RandomState(seed + 2).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def _random(module: Any, seed: int) -> Arrays:
    """Gives every parameter a random value away from its initial one; returns them."""
    import torch

    random = np.random.RandomState(seed)
    weights = {}
    for name, parameter in module.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        value = random.normal(size=parameter.shape) * spread + (1.0 if "norm" in name else 0.0)
        parameter.data = torch.tensor(value, dtype=torch.float32)
        weights[f"weights/{name}"] = value.astype(np.float32)
    return weights


def _run(weights: Arrays, function: Callable[[Any], Any], seed: int) -> Arrays:
    """The output of `function(x)` and the gradient in `x`."""
    import torch

    x = torch.tensor(hidden(seed), requires_grad=True)
    y = function(x)
    (y * torch.tensor(cotangent(seed))).sum().backward()
    return {**weights, "output": y.detach().numpy(), "gradient": x.grad.numpy()}


def _mask(causal: bool = True) -> Any:
    import torch

    i = torch.arange(LENGTH)
    return torch.where((i[:, None] >= i[None]) | (not causal), 0.0, -1e30)[None, None]


def _rotated(family: str, prefix: str, seed: int, **options: Any) -> Arrays:
    """A layer that takes the cosines and sines of its positions."""
    import torch

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(module, f"{prefix}Config")(**{**GROUPED, **options})
    layer = getattr(module, f"{prefix}Attention")(config, 0).eval()
    rotary, positions = getattr(module, f"{prefix}RotaryEmbedding")(config), torch.arange(LENGTH)[None]
    weights = _random(layer, seed)
    return _run(weights, lambda x: layer(x, position_embeddings=rotary(x, positions), attention_mask=_mask())[0], seed)


def llama31(seed: int = 0) -> Arrays:
    """Llama 3.1's stretched waves."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return _rotated("llama", "Llama", seed, rope_parameters={**rope, "original_max_position_embeddings": 64})


def llama_linear(seed: int = 0) -> Arrays:
    """Positions divided by a factor."""
    return _rotated("llama", "Llama", seed, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})


def qwen2(seed: int = 0) -> Arrays:
    """Biases of q, k and v, and YaRN whose ramp has whole ends."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return _rotated("qwen2", "Qwen2", seed, rope_parameters=rope)


def gpt_oss_yarn(seed: int = 0) -> Arrays:
    """All biases, sink logits, and YaRN whose ramp is not truncated."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
    return _rotated(
        "gpt_oss",
        "GptOss",
        seed,
        attention_bias=True,
        layer_types=["full_attention"],
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )


def olmo2(seed: int = 0) -> Arrays:
    """Queries and keys normalised over all heads."""
    return _rotated("olmo2", "Olmo2", seed, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e4})


def gpt_neox(seed: int = 0) -> Arrays:
    """A quarter of each head is rotated."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    options = {"num_attention_heads": 3, "intermediate_size": 8, "rope_parameters": rope}
    import torch
    from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox

    config = gpt_neox.GPTNeoXConfig(hidden_size=WIDTH, num_hidden_layers=1, attn_implementation="eager", **options)
    layer, rotary = gpt_neox.GPTNeoXAttention(config, 0).eval(), gpt_neox.GPTNeoXRotaryEmbedding(config)
    weights, positions = _random(layer, seed), torch.arange(LENGTH)[None]
    return _run(weights, lambda x: layer(x, _mask(), position_embeddings=rotary(x, positions))[0], seed)


def deepseek_yarn(seed: int = 0) -> Arrays:
    """Latent attention whose scale grows with YaRN's factor."""
    import torch
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.7}
    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rope_interleave=True,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
        attn_implementation="eager",
    )
    layer, rotary = deepseek.DeepseekV3Attention(config, 0).eval(), deepseek.DeepseekV3RotaryEmbedding(config)
    weights, positions = _random(layer, seed), torch.arange(LENGTH)[None]
    return _run(weights, lambda x: layer(x, rotary(x, positions), _mask())[0], seed)


def gpt2(seed: int = 0) -> Arrays:
    """Learned positions at the embedding, and all biases."""
    import torch
    from transformers.models.gpt2 import modeling_gpt2

    config = modeling_gpt2.GPT2Config(n_embd=WIDTH, n_head=3, n_layer=1, n_positions=LENGTH + 4, attn_implementation="eager")
    layer, table = modeling_gpt2.GPT2Attention(config, layer_idx=0).eval(), torch.nn.Embedding(LENGTH + 4, WIDTH)
    weights = _random(torch.nn.ModuleDict({"attention": layer, "positions": table}), seed)
    return _run(weights, lambda x: layer(x + table(torch.arange(LENGTH)[None]), attention_mask=_mask())[0], seed)


def _t5(causal: bool, seed: int) -> Arrays:
    from transformers.models.t5 import modeling_t5

    config = modeling_t5.T5Config(
        d_model=WIDTH,
        d_kv=8,
        num_heads=4,
        is_decoder=causal,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
    )
    layer = modeling_t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    weights = _random(layer, seed)
    return _run(weights, lambda x: layer(x, mask=_mask(causal))[0], seed)


def t5_decoder(seed: int = 0) -> Arrays:
    """Biases by bucket of distance, logits that are not scaled."""
    return _t5(True, seed)


def t5_encoder(seed: int = 0) -> Arrays:
    """The same in both directions."""
    return _t5(False, seed)


def bloom(seed: int = 0) -> Arrays:
    """ALiBi of a number of heads that is no power of two, and all biases."""
    import torch
    from transformers.models.bloom import modeling_bloom

    config = modeling_bloom.BloomConfig(hidden_size=WIDTH, n_head=6, n_layer=1, hidden_dropout=0.0, attention_dropout=0.0)
    layer = modeling_bloom.BloomAttention(config, layer_idx=0).eval()
    weights = _random(layer, seed)
    alibi = modeling_bloom.build_alibi_tensor(torch.ones(BATCH, LENGTH), 6, torch.float32)
    zeros = torch.zeros(BATCH, LENGTH, WIDTH)
    return _run(weights, lambda x: layer(x, zeros, alibi, _mask())[0], seed)


ORACLES: dict[str, Callable[..., Arrays]] = {
    f.__name__: f
    for f in (
        llama31, llama_linear, qwen2, gpt_oss_yarn, olmo2, gpt_neox, deepseek_yarn, gpt2, t5_decoder, t5_encoder, bloom,
    )
}  # fmt: skip


if __name__ == "__main__":
    for name, oracle in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **oracle())

"""Golden outputs of `transformers` models and layers: `python tests/models/golden/generate.py` writes the .npz files beside it.

Needs torch and transformers (see the `oracle` extra). A file holds the inputs, the random weights under their names there, and
the output; nothing else of the other library is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH, LENGTH, WIDTH, VOCAB = 2, 21, 16, 32
WINDOW = 5
DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
Arrays = dict[str, np.ndarray]


def _random(module, seed: int) -> Arrays:
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


def _decoder(config_class: str, model_class: str, seed: int, **options) -> Arrays:
    import torch
    import transformers

    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**DECODER, **options)).eval()
    weights = _random(model, seed)
    tokens = np.random.RandomState(seed + 1).randint(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits
    return {**weights, "tokens": tokens, "output": logits.numpy()}


def llama(seed: int = 0) -> Arrays:
    """Grouped heads, rotary embedding, SwiGLU."""
    return _decoder("LlamaConfig", "LlamaForCausalLM", seed, rms_norm_eps=1e-6)


def qwen3(seed: int = 0) -> Arrays:
    """The same with normalised queries and keys and another rotary base."""
    return _decoder(
        "Qwen3Config", "Qwen3ForCausalLM", seed, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )


def _hidden(seed: int) -> np.ndarray:
    return np.random.RandomState(seed + 1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def _gpt_oss(layer_type: str, seed: int) -> Arrays:
    import torch
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    config = gpt_oss.GptOssConfig(
        **DECODER,
        attention_bias=False,
        layer_types=[layer_type] * 2,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    layer = gpt_oss.GptOssAttention(config, 0).eval()
    weights, x = _random(layer, seed), _hidden(seed)
    positions = torch.arange(LENGTH)
    distance = positions[:, None] - positions[None]
    visible = (distance >= 0) & (distance < (WINDOW if layer_type == "sliding_attention" else LENGTH))
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        angles = gpt_oss.GptOssRotaryEmbedding(config)(torch.tensor(x), positions[None])
        y, _ = layer(torch.tensor(x), angles, mask)
    return {**weights, "x": x, "output": y.numpy()}


def gpt_oss(seed: int = 0) -> Arrays:
    """Attention with a sink logit per head."""
    return _gpt_oss("full_attention", seed)


def gpt_oss_window(seed: int = 0) -> Arrays:
    """The same in a sliding window."""
    return _gpt_oss("sliding_attention", seed)


def qwen3_next(seed: int = 0) -> Arrays:
    """The gated DeltaNet layer: convolutions, grouped value heads, decay, delta rule, gated norm."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    config = qwen3_next.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
    )
    layer = qwen3_next.Qwen3NextGatedDeltaNet(config, 0).eval()
    weights, x = _random(layer, seed), _hidden(seed)
    with torch.no_grad():
        y = layer(torch.tensor(x))
    return {**weights, "x": x, "output": y.numpy()}


def mamba2(seed: int = 0) -> Arrays:
    """The Mamba-2 layer, with two groups of two heads."""
    import torch
    from transformers.models.mamba2 import modeling_mamba2

    config = modeling_mamba2.Mamba2Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=2,
        conv_kernel=4,
        expand=2,
        chunk_size=8,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
    )
    layer = modeling_mamba2.Mamba2Mixer(config, 0).eval()
    weights, x = _random(layer, seed), _hidden(seed)
    with torch.no_grad():
        y = layer(torch.tensor(x))
    return {**weights, "x": x, "output": y.numpy()}


def _deepseek(q_rank: int | None, seed: int) -> Arrays:
    import torch
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    layer = deepseek.DeepseekV3Attention(config, 0).eval()
    weights, x = _random(layer, seed), _hidden(seed)
    positions = torch.arange(LENGTH)
    mask = torch.where(positions[:, None] >= positions[None], 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        angles = deepseek.DeepseekV3RotaryEmbedding(config)(torch.tensor(x), positions[None])
        y, _ = layer(torch.tensor(x), angles, mask)
    return {**weights, "x": x, "output": y.numpy()}


def mla(seed: int = 0) -> Arrays:
    """The attention of DeepSeek-V3, whose queries come from a latent."""
    return _deepseek(10, seed)


def mla_full_queries(seed: int = 0) -> Arrays:
    """The same with queries from the residual stream, as in DeepSeek-V2-Lite."""
    return _deepseek(None, seed)


ORACLES: dict[str, Callable[..., Arrays]] = {
    f.__name__: f for f in (llama, qwen3, gpt_oss, gpt_oss_window, qwen3_next, mamba2, mla, mla_full_queries)
}


if __name__ == "__main__":
    for name, oracle in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **oracle())

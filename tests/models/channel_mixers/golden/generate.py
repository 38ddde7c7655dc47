"""Golden outputs of `transformers` mixtures of experts: `python tests/models/channel_mixers/golden/generate.py` writes the .npz files.

Needs torch and transformers (see the `oracle` extra). A file holds the inputs, the random weights under their names there, and
the output; nothing else of the other library is kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, EXPERTS, INNER = 16, 6, 8
Arrays = dict[str, np.ndarray]


def _outputs(layer, seed: int) -> Arrays:
    """Random weights and biases, inputs, and what the layer makes of them."""
    import torch

    random = np.random.RandomState(seed)
    arrays = {"x": random.normal(size=(2, 21, WIDTH)).astype(np.float32)}
    for name, array in (*layer.named_parameters(), *layer.named_buffers()):
        spread = 0.2 if array.ndim == 1 else array.shape[-1] ** -0.5
        arrays[f"weights/{name}"] = (random.normal(size=array.shape) * spread).astype(np.float32)
        array.data = torch.tensor(arrays[f"weights/{name}"])
    with torch.no_grad():
        arrays["output"] = layer.eval()(torch.tensor(arrays["x"])).numpy()
    return arrays


def qwen3_moe(seed: int = 0) -> Arrays:
    """Scores by softmax, gates that sum to one."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    config = qwen3.Qwen3MoeConfig(
        hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=INNER, norm_topk_prob=True
    )
    return _outputs(qwen3.Qwen3MoeSparseMoeBlock(config), seed)


def deepseek_v3(seed: int = 0) -> Arrays:
    """Scores by sigmoid, biases that choose, gates that sum to 2.5, two shared experts."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=INNER,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
    )
    return _outputs(deepseek.DeepseekV3MoE(config), seed)


ORACLES = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}

if __name__ == "__main__":
    for name, oracle in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **oracle())

"""Golden output of Falcon-H1's mixer: `python tests/models/golden/generate_parallel.py` writes the .npz file beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
BATCH, LENGTH, WIDTH = 2, 21, 16
IN_MULTIPLIERS, OUT_MULTIPLIERS = (0.75, 1.25), (0.5, 1.5)
KEY_MULTIPLIER, SSM_MULTIPLIERS = 0.625, (0.875, 1.125, 0.75, 1.25, 0.5)


def falcon_h1(seed: int = 0) -> Arrays:
    """Attention and Mamba-2 of one layer, read, scaled and summed as the decoder layer does; weights by their names there."""
    import torch
    from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon

    config = falcon.FalconH1Config(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=6,
        mamba_d_conv=4,
        mamba_chunk_size=8,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        attention_in_multiplier=IN_MULTIPLIERS[0],
        ssm_in_multiplier=IN_MULTIPLIERS[1],
        attention_out_multiplier=OUT_MULTIPLIERS[0],
        ssm_out_multiplier=OUT_MULTIPLIERS[1],
        key_multiplier=KEY_MULTIPLIER,
        ssm_multipliers=list(SSM_MULTIPLIERS),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    layer = falcon.FalconH1DecoderLayer(config, 0).eval()
    layer.mamba.mup_vector = falcon.compute_mup_vector(config)
    random = np.random.RandomState(seed)
    weights = {}
    for name, parameter in layer.named_parameters():
        if not name.startswith(("mamba.", "self_attn.")):
            continue
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        value = random.normal(size=parameter.shape) * spread + (1.0 if "norm" in name else 0.0)
        parameter.data = torch.tensor(value, dtype=torch.float32)
        weights[f"weights/{name}"] = value.astype(np.float32)
    x = random.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    h, positions = torch.tensor(x), torch.arange(LENGTH)
    mask = torch.where(positions[:, None] >= positions[None], 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        angles = falcon.FalconH1RotaryEmbedding(config)(h, positions[None])
        attended = layer.self_attn(h * layer.attention_in_multiplier, angles, mask)[0] * layer.attn_out_multiplier
        y = layer.mamba(h) * layer.ssm_out_multiplier + attended
    return {**weights, "x": x, "output": y.numpy()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "falcon_h1.npz", **falcon_h1())

"""Golden outputs for attention with other queries, keys and values: `python tests/models/golden/generate_variants.py FOLDER` writes them.

Needs torch, transformers and einops. FOLDER holds what the authors of three layers published, which nothing of ours does:
`dual_attention/` (github.com/Awni00/dual-attention), `kdgqa.py` and `utils.py` (github.com/zohaib-khan5040/key-driven-gqa) and
`multihead_flashdiffv2.py` (github.com/microsoft/unilm, Diff-Transformer-V2).
A file holds the inputs, the random weights, the output and the gradient of its product with a cotangent in x.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCH, LENGTH, WIDTH, LAYER = 2, 19, 16, 3
Arrays = dict[str, np.ndarray]


def _randomize(module, seed: int) -> Arrays:
    """Gives every parameter a random value; returns them."""
    import torch

    random, weights = np.random.RandomState(seed), {}
    for name, parameter in module.named_parameters():
        value = random.normal(size=parameter.shape) * (0.5 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
        parameter.data = torch.tensor(value, dtype=torch.float32)
        weights[f"weights/{name}"] = value.astype(np.float32)
    return weights


def _run(function: Callable, seed: int) -> Arrays:
    """What `function` makes of a random x `[B, T, D]`."""
    import torch

    random = np.random.RandomState(seed + 1)
    x, cotangent = (random.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32) for _ in range(2))
    at = torch.tensor(x, requires_grad=True)
    y = function(at)
    (y * torch.tensor(cotangent)).sum().backward()
    return {"x": x, "cotangent": cotangent, "output": y.detach().numpy(), "x_grad": at.grad.numpy()}


def diff(seed: int = 0) -> Arrays:
    """DiffLlama's attention: four maps, so two heads, and two key heads in one group."""
    import torch
    from transformers.models.diffllama import modeling_diffllama as diffllama

    config = diffllama.DiffLlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        attention_bias=False,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    layer = diffllama.DiffLlamaAttention(config, LAYER).eval()
    weights, positions = _randomize(layer, seed), torch.arange(LENGTH)
    mask = torch.where(positions[:, None] >= positions[None], 0.0, -torch.inf)[None, None]

    def run(x):
        return layer(x, diffllama.DiffLlamaRotaryEmbedding(config)(x, positions[None]), mask)[0]

    return {**weights, **_run(run, seed)}


def _projections(seed: int, *names: str) -> tuple[dict, Arrays]:
    """Random `[D, D]` matrices and `[3, D]` filters of q, k and v, as tensors and as arrays."""
    import torch

    random = np.random.RandomState(seed)
    arrays = {f"weights/{n}": (random.normal(size=(WIDTH, WIDTH)) * WIDTH**-0.5).astype(np.float32) for n in names}
    arrays |= {f"weights/{n}_conv": random.normal(size=(3, WIDTH)).astype(np.float32) for n in "qkv"}
    return {name.removeprefix("weights/"): torch.tensor(a) for name, a in arrays.items()}, arrays


def _convolved(x, w: dict) -> list:
    """q, k and v `[B, T, 4, 4]` of x, through torch's depthwise convolution."""
    import torch

    def one(name: str):
        y = torch.nn.functional.pad((x @ w[name]).transpose(1, 2), (2, 0))
        y = torch.nn.functional.conv1d(y, w[f"{name}_conv"].T[:, None], groups=WIDTH)
        return y.transpose(1, 2).reshape(BATCH, LENGTH, 4, 4)

    return [one(name) for name in "qkv"]


def mdha(seed: int = 0) -> Arrays:
    """Convolved heads without positions."""
    import torch

    w, arrays = _projections(seed, *"qkvo")

    def run(x):
        q, k, v = (y.transpose(1, 2) for y in _convolved(x, w))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH) @ w["o"]

    return {**arrays, **_run(run, seed)}


def rcmha(seed: int = 0) -> Arrays:
    """Convolved heads, scored and weighed by XLNet's relative attention."""
    import torch
    from transformers.models.xlnet import modeling_xlnet as xlnet

    config = xlnet.XLNetConfig(d_model=WIDTH, n_head=4, n_layer=1, d_inner=8, attn_type="uni", dropout=0.0, vocab_size=8)
    model = xlnet.XLNetModel(config).eval()
    layer = model.layer[0].rel_attn
    w, arrays = _projections(seed, *"qkvor")
    random = np.random.RandomState(seed + 2)
    for ours, theirs in (("u", "r_w_bias"), ("w", "r_r_bias")):
        arrays[f"weights/{ours}"] = random.normal(size=(4, 4)).astype(np.float32)
        getattr(layer, theirs).data = torch.tensor(arrays[f"weights/{ours}"])
    positions = torch.arange(LENGTH)
    mask = (positions[:, None] < positions[None]).float()[:, :, None, None]

    def run(x):
        q, k, v = (y.transpose(0, 1) for y in _convolved(x, w))  # time first
        r = model.relative_positional_encoding(LENGTH, LENGTH, bsz=BATCH) @ w["r"]
        o = layer.rel_attn_core(q, k, v, r.reshape(*r.shape[:2], 4, 4), attn_mask=mask)
        return o.transpose(0, 1).reshape(BATCH, LENGTH, WIDTH) @ w["o"]

    return {**arrays, **_run(run, seed)}


def dual_attention(seed: int = 0) -> Arrays:
    """Two sensory and two relational heads in one group each, four relations, symbols by attention."""
    from dual_attention.dual_attention import DualAttention
    from dual_attention.symbol_retrieval import SymbolicAttention
    from torch import nn

    options = {"n_kv_heads": 1}
    both = nn.ModuleDict(
        {
            "layer": DualAttention(WIDTH, 2, 2, 0.0, sa_kwargs=options, ra_kwargs={**options, "n_relations": 4}),
            "symbols": SymbolicAttention(WIDTH, 2, 5),
        }
    ).eval()
    weights = _randomize(both, seed)
    return {**weights, **_run(lambda x: both["layer"](x, both["symbols"](x), is_causal=True)[0], seed)}


def diff_v2(seed: int = 0) -> Arrays:
    """Two heads of four queries on one key and value, without positions; flash attention is torch's."""
    import torch

    def flash(q, k, v, causal):
        heads = (y.transpose(1, 2) for y in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True).transpose(1, 2)

    rotary = types.SimpleNamespace(apply_rotary_emb=lambda x, interleaved: x)
    sys.modules |= {"flash_attn": types.SimpleNamespace(flash_attn_func=flash), "kernel": rotary, "kernel.rotary": rotary}
    from multihead_flashdiffv2 import MultiheadFlashDiffV2

    layer = MultiheadFlashDiffV2(True, WIDTH, 4, 2, 4).eval()
    weights = _randomize(layer, seed)
    return {**weights, **_run(lambda x: layer(x, ()), seed)}


def kdgqa(seed: int = 0) -> Arrays:
    """Eight queries on four keys, allotted by this batch."""
    from kdgqa import KDGQA

    layer = KDGQA(WIDTH, 8, num_kv_heads=4).eval()
    layer.proj.bias = None
    return {**_randomize(layer, seed), **_run(layer, seed)}


LIVE: dict[str, Callable[..., Arrays]] = {f.__name__: f for f in (diff, mdha, rcmha)}
"""Those that the oracle packages give."""
ORACLES = LIVE | {f.__name__: f for f in (dual_attention, diff_v2, kdgqa)}

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    for oracle_name, make in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{oracle_name}.npz", **make())

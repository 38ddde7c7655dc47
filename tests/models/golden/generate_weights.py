"""Golden outputs of the authors' own attention layers: `python tests/models/golden/generate_weights.py FOLDER` writes .npz files beside it.

FOLDER holds clones of trestad/CogAttn, awayfromzel/neural-attention-research, facebookresearch/RAM and
gioannides/Gaussian-Adaptive-Attention. Needs torch and einops. A file holds input, random weights under their names there, output, and
the gradient of `sum(output * cotangent)` in the input.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, WIDTH, HEADS = 2, 13, 16, 4
Arrays = dict[str, np.ndarray]


def _load(file: Path, **stubs: dict[str, Any]) -> Any:
    """A module by its file; `stubs` are modules that it imports and does not need."""
    for key, members in stubs.items():
        name = key.replace("__", ".")
        for parent in (name[:i] for i, letter in enumerate(name + ".") if letter == "."):
            sys.modules.setdefault(parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(members)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(layer: Any, forward: Callable[[Any], Any], seed: int) -> Arrays:
    """Random weights, and what the layer makes of a random input."""
    import torch

    random = np.random.RandomState(seed)
    arrays = {}
    for name, parameter in layer.named_parameters():
        value = random.normal(size=parameter.shape) * (0.3 if parameter.ndim == 1 else 0.5)
        value = np.exp(value) if name.endswith(".c") else value  # widths of Gaussians
        parameter.data = torch.tensor(value, dtype=torch.float32)
        arrays[f"weights/{name}"] = value.astype(np.float32)
    x, cotangent = random.normal(size=(2, BATCH, LENGTH, WIDTH)).astype(np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    y = forward(leaf)
    (y * torch.tensor(cotangent)).sum().backward()
    return {**arrays, "x": x, "cotangent": cotangent, "output": y.detach().numpy(), "gradient": leaf.grad.numpy()}


def cog(folder: Path, seed: int = 0) -> Arrays:
    """Signed softmax, rotary embedding of neighbouring channels."""
    import torch

    authors = _load(folder / "CogAttn/Cogformer/attention.py")
    layer = authors.CogAttention(0, WIDTH, HEADS, WIDTH // HEADS)
    angles = authors.precompute_freqs_cis(WIDTH // HEADS, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(BATCH, HEADS, -1, -1)
    return _run(layer, lambda x: layer(x, angles, mask)[0], seed)


def neural_attention(folder: Path, seed: int = 0) -> Arrays:
    """A network of three layers for each pair."""
    authors = _load(folder / "neural-attention-research/nlp_neural_attention/Models/NeuralAttention.py")
    layer = authors.NeuralAttention(WIDTH, heads=HEADS, causal=True, projection_dim=6)
    return _run(layer, layer, seed)


def mta(folder: Path, seed: int = 0) -> Arrays:
    """Logits convolved over 3 queries and 5 keys, pairs of heads mixed, per-head norm scaled by depth, gate; no positions."""
    import torch

    names = ("FeedForward", "InitStdFactor", "RotaryEmbedding")
    lingua = dict.fromkeys(names) | {"apply_rotary_emb": lambda q, k, *_: (q, k), "repeat_kv": lambda x, *_, **__: x}
    stubs = {
        "lingua__transformer": lingua,
        "xformers__ops": {"AttentionBias": None, "fmha": None},
        "public_repos__multitokenatention_triton__mta_attention_triton": {"MTAAttentionTriton": None},
    }
    tensor = torch.tensor

    def anywhere(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """Theirs want a GPU."""
        return tensor(*args, **options)

    torch.tensor = anywhere
    try:
        authors = _load(folder / "RAM/projects/mta/mta_transformer.py", **stubs)
        options = authors.MTATransformerArgs(
            use_mta=True,
            query_kernel_size=3,
            key_kernel_size=5,
            head_kernel_size=2,
            group_norm=True,
            layer_norm_rescale=True,
            add_gating=True,
        )
        layer = authors.Attention(
            dim=WIDTH,
            head_dim=WIDTH // HEADS,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            rope_theta=1e4,
            cache_attention_maps=False,
            max_seq_len=LENGTH,
            mta=options,
            dropout=0.0,
            layer_id=2,
        )
        return _run(layer, lambda x: layer(x, torch.zeros(LENGTH)), seed)
    finally:
        torch.tensor = tensor


def gaam(folder: Path, seed: int = 0) -> Arrays:
    """Products of two Gaussians over the channels of a head."""
    authors = _load(folder / "Gaussian-Adaptive-Attention/gaussian_adaptive_attention/GaussianBlock.py")
    layer = authors.MultiHeadGaussianAdaptiveAttention(-1, HEADS, 2)
    return _run(layer, layer, seed)


ORACLES: dict[str, Callable[..., Arrays]] = {f.__name__: f for f in (cog, neural_attention, mta, gaam)}


if __name__ == "__main__":
    for name, oracle in ORACLES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **oracle(Path(sys.argv[1])))

"""Golden outputs of the authors' own sparse attention: `python tests/models/golden/generate_sparse.py FOLDER` writes .npz files beside it.

FOLDER holds clones of MoonshotAI/MoBA and fla-org/native-sparse-attention. Needs torch, einops and transformers. A file holds q, k, v,
gates where there are any, two documents in a row, the output, and the gradient of `sum(output * cotangent)` in each input; of a layer of
transformers what the other generators write.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENTS, HEADS, KV_HEADS, DIM = (37, 26), 4, 2, 8
BLOCK, TOP_K, WINDOW, KEPT = 8, 3, 6, 5
Arrays = dict[str, np.ndarray]


def _load(file: Path) -> Any:
    """A module by its file, of which nothing is compiled."""
    import torch

    torch.compile = lambda function, **options: function
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(forward: Callable[..., Any], seed: int, **gates: int) -> Arrays:
    """What `forward` makes of random inputs `[1, T, H, K]` and gates `[1, T, H]`."""
    import torch

    random = np.random.RandomState(seed)
    length = sum(DOCUMENTS)
    arrays = {
        name: random.normal(size=(1, length, heads, DIM)) for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    arrays |= {name: random.uniform(size=(1, length, heads)) for name, heads in gates.items()}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    cotangent = random.normal(size=(1, length, HEADS, DIM)).astype(np.float32)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in arrays.items()}
    o = forward(**leaves)
    (o * torch.tensor(cotangent)).sum().backward()
    gradients = {f"gradient/{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
    return {**arrays, **gradients, "cotangent": cotangent, "output": o.detach().numpy()}


def moba(folder: Path, seed: int = 0) -> Arrays:
    """A key head for each query head there."""
    import torch

    authors = _load(folder / "MoBA/moba/moba_naive.py")
    ends = torch.tensor(np.cumsum((0, *DOCUMENTS)), dtype=torch.int32)

    def forward(q: Any, k: Any, v: Any) -> Any:
        k, v = (x[0].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        return authors.moba_attn_varlen_naive(q[0], k, v, ends, max(DOCUMENTS), BLOCK, TOP_K)[None]

    return _run(forward, seed)


def nsa(folder: Path, seed: int = 1) -> Arrays:
    """Means of whole blocks, keys of one kind; the query's own block is always chosen."""
    import torch

    naive = _load(folder / "native-sparse-attention/native_sparse_attention/ops/naive.py")

    def forward(q: Any, k: Any, v: Any, g_cmp: Any, g_slc: Any, g_swa: Any) -> Any:
        found = []
        for start, stop in zip(np.cumsum((0, *DOCUMENTS)), np.cumsum(DOCUMENTS), strict=False):
            one = [x[:, start:stop] for x in (q, k, v, g_cmp, g_slc, g_swa)]
            found.append(naive.naive_nsa_with_compression(*one, TOP_K, block_size=BLOCK, window_size=WINDOW)[0])
        return torch.cat(found, dim=1)

    return _run(forward, seed, g_cmp=HEADS, g_slc=HEADS, g_swa=HEADS)


def dma(folder: Path, seed: int = 2) -> Arrays:
    """Doge's layer, which sees five tokens."""
    import torch
    from transformers.models.doge.configuration_doge import DogeConfig
    from transformers.models.doge.modeling_doge import DogeAttention, DogeRotaryEmbedding

    sys.path.insert(0, str(Path(__file__).parent))
    from generate_weights import BATCH, LENGTH, WIDTH, _run

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": WIDTH // HEADS}
    config = DogeConfig(**sizes, keep_window_size=KEPT, rms_norm_eps=1e-6, attn_implementation="eager")
    layer, at = DogeAttention(config, 0), torch.arange(LENGTH)[None].expand(BATCH, -1)
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None].expand(BATCH, 1, -1, -1)
    turned = DogeRotaryEmbedding(config)
    return _run(layer, lambda x: layer(x, turned(x, at), mask)[0], seed)


GENERATORS = {"moba": moba, "nsa": nsa, "dma": dma}

if __name__ == "__main__":
    for name, generate in GENERATORS.items():
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **generate(Path(sys.argv[1])))

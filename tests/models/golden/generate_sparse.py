"""Golden outputs of the authors' own sparse attention: `python tests/models/golden/generate_sparse.py FOLDER [NAME ...]` writes
.npz files beside it.

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


DSA = {
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "index_n_heads": 5,
    "index_head_dim": 6,
    "index_topk": KEPT,
}


def dsa(folder: Path, seed: int = 3) -> Arrays:
    """DeepSeek-V3.2's layer, which sees five tokens, and the paper's two losses of its indexer, with their gradients in its weights."""
    import torch
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
        DeepseekV32Attention,
        DeepseekV32RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    sys.path.insert(0, str(Path(__file__).parent))
    from generate_weights import BATCH, LENGTH, WIDTH, _run

    config = DeepseekV32Config(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, **DSA)
    config._attn_implementation = "eager"
    layer, at = DeepseekV32Attention(config, 0), torch.arange(LENGTH)[None].expand(BATCH, -1)
    future = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    mask, turned = future[None, None].expand(BATCH, 1, -1, -1), DeepseekV32RotaryEmbedding(config)
    arrays = _run(layer, lambda x: layer(x, turned(x, at), mask)[0], seed)
    x, indexer, (cos, sin) = torch.tensor(arrays["x"]), layer.indexer, turned(torch.tensor(arrays["x"]), at)

    def scores() -> Any:
        latent = layer.q_a_layernorm(layer.q_a_proj(x)).detach()
        parts = [DSA["qk_rope_head_dim"], DSA["index_head_dim"] - DSA["qk_rope_head_dim"]]
        q = indexer.wq_b(latent).view(BATCH, LENGTH, DSA["index_n_heads"], -1).split(parts, -1)
        k = indexer.k_norm(indexer.wk(x))[:, :, None].split(parts, -1)
        first = apply_rotary_pos_emb(q[0], k[0], cos, sin, unsqueeze_dim=2)
        q, k = (torch.cat([a, b[1]], -1) for a, b in zip(first, (q, k), strict=True))
        z = torch.relu(torch.einsum("bthc,bsxc->bths", q, k) * indexer.softmax_scale)
        return torch.einsum("bths,bth->bts", z, indexer.weights_proj(x) * DSA["index_n_heads"] ** -0.5)

    for stage, kept in (("warm_up", LENGTH), ("sparse", KEPT)):
        config.index_topk = indexer.index_topk = kept
        indexer.zero_grad()
        target = layer(x, turned(x, at), mask)[1].detach().sum(1)
        target = target / target.sum(-1, keepdim=True)
        visible = scores() + future
        best = visible.detach().topk(min(kept + 1, LENGTH), -1).values
        assert kept == LENGTH or (best[:, KEPT:, -2] - best[:, KEPT:, -1]).min() > 1e-3  # torch takes any of equal ones
        chosen = torch.zeros_like(visible, dtype=torch.bool).scatter(-1, visible.topk(kept, -1).indices, True)
        log_share = visible.masked_fill(~chosen, -torch.inf).log_softmax(-1).masked_fill(target == 0, 0)
        loss = torch.nn.functional.kl_div(log_share, target, reduction="none").sum(-1).mean()
        loss.backward()
        arrays[f"loss/{stage}"] = loss.detach().numpy()
        arrays |= {f"gradient/{stage}/{name}": p.grad.numpy() for name, p in indexer.named_parameters()}
    return arrays


GENERATORS = {"dsa": dsa, "moba": moba, "nsa": nsa, "dma": dma}

if __name__ == "__main__":
    for name in sys.argv[2:] or GENERATORS:
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **GENERATORS[name](Path(sys.argv[1])))

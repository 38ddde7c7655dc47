"""Golden outputs of PyTorch and of flash-linear-attention's naive references.

`python tests/kernels/golden/generate.py` writes the .npz files beside it. It needs torch, einops and fla-core, the last installed
with `--no-deps`; nothing of them is kept here but numbers.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, HEADS, KEY_DIM, VALUE_DIM = 1, 37, 2, 8, 4


def _naive(op: str) -> Any:
    """The module `fla/ops/<op>/naive.py`, loaded by path because `fla.ops` itself wants a GPU compiler."""
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(f"naive_{op}", root / "ops" / op / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _gla(q, k, v, g, initial_state):
    return _naive("gla").naive_recurrent_gla(q, k, v, g, initial_state=initial_state, output_final_state=True)


def _simple_gla(q, k, v, g, initial_state):
    return _naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g, initial_state=initial_state, output_final_state=True)


def _deltanet(q, k, v, beta, initial_state):
    heads_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
    o, state = _naive("delta_rule").delta_rule_recurrence(*heads_first, initial_state=initial_state)
    return o.transpose(1, 2), state


def _gated_deltanet(q, k, v, *, g, beta, initial_state):
    run = _naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return run(q, k, v, beta=beta, g=g, initial_state=initial_state, output_final_state=True)


def _kda(q, k, v, *, g, beta, initial_state):
    return _naive("kda").naive_recurrent_kda(q, k, v, g, beta, initial_state=initial_state, output_final_state=True)


def _attention(q, k, v):
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)


def _short_conv(x, weight):
    from torch.nn.functional import conv1d, silu

    width, channels = weight.shape
    y = conv1d(x.transpose(1, 2), weight.T[:, None, :], padding=width - 1, groups=channels)
    return (silu(y[..., : x.shape[1]]).transpose(1, 2),)


def _cross_entropy(hidden, weight, targets):
    from torch.nn.functional import cross_entropy

    return (cross_entropy((hidden @ weight).transpose(1, 2), targets, reduction="none"),)


ORACLES: dict[str, Callable[..., Any]] = {
    "scalar_decay": _simple_gla,
    "vector_decay": _gla,
    "deltanet": _deltanet,
    "gated_deltanet": _gated_deltanet,
    "kda": _kda,
    "attention": _attention,
    "short_conv": _short_conv,
    "cross_entropy": _cross_entropy,
}


def inputs(name: str, seed: int = 0, length: int = LENGTH) -> dict[str, np.ndarray]:
    """The oracle's arguments by name."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    if name == "short_conv":
        return {"x": normal(BATCH, length, 6), "weight": normal(4, 6)}
    if name == "cross_entropy":
        return {"hidden": normal(BATCH, length, 8), "weight": normal(8, 30), "targets": rng.integers(0, 30, (BATCH, length))}
    if name == "attention":
        return {"q": normal(BATCH, length, 4, 8), "k": normal(BATCH, length, 2, 8), "v": normal(BATCH, length, 2, 4)}
    k = normal(BATCH, length, HEADS, KEY_DIM)
    named = {"q": normal(BATCH, length, HEADS, KEY_DIM), "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    named["v"] = normal(BATCH, length, HEADS, VALUE_DIM)
    if name != "deltanet":
        named["g"] = -np.exp(normal(BATCH, length, HEADS, *([KEY_DIM] if name in ("vector_decay", "kda") else [])))
    if name in ("deltanet", "gated_deltanet", "kda"):
        named["beta"] = 1 / (1 + np.exp(-normal(BATCH, length, HEADS)))
    return named | {"initial_state": normal(BATCH, HEADS, KEY_DIM, VALUE_DIM)}


def wave(shape: tuple[int, ...]) -> np.ndarray:
    """The cotangent of an output."""
    return np.cos(1.7 * (np.arange(np.prod(shape)) % 97)).reshape(shape).astype(np.float32)


def run(name: str, arguments: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The oracle's outputs, as `out0`, `out1`, and the gradients of every floating argument, as `d_<name>`."""
    import torch

    tensors = {key: torch.tensor(x, requires_grad=x.dtype == np.float32) for key, x in arguments.items()}
    outputs = ORACLES[name](**tensors)
    sum((o * torch.tensor(wave(tuple(o.shape)))).sum() for o in outputs).backward()
    results = {f"out{i}": o.detach().numpy() for i, o in enumerate(outputs)}
    return results | {f"d_{key}": x.grad.numpy() for key, x in tensors.items() if x.requires_grad}


def main() -> None:
    folder = Path(__file__).parent
    for name in ORACLES:
        arguments = inputs(name)
        np.savez_compressed(folder / f"{name}.npz", **arguments, **run(name, arguments))
        sys.stdout.write(f"{name}: {(folder / name).with_suffix('.npz').stat().st_size} bytes\n")


if __name__ == "__main__":
    main()

"""The calls that `kernels.py` times: every op through its public function, and the same by others where they can be imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rooflines import TAPS, Shape

from plait import kernels
from plait.kernels import Mask, Tokens

OPS = ("attention", "scalar_decay", "vector_decay", "deltanet", "gated_deltanet", "kda", "short_conv", "cross_entropy")
FUNCTIONS = {
    "scalar_decay": "decay",
    "vector_decay": "decay",
    "deltanet": "delta_rule",
    "gated_deltanet": "delta_rule",
    "kda": "delta_rule",
}
"""The public function where it has another name."""

JLA_KINDS = {
    "scalar_decay": "simple_gla",
    "vector_decay": "gla",
    "deltanet": "deltanet",
    "gated_deltanet": "gated_deltanet",
    "kda": "kda",
}

Arrays = dict[str, Any]


def shapes(
    op: str, shape: Shape, dtype: str
) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, tuple[tuple[int, ...], str]]]:
    """Shape and dtype by name: of the arguments with gradients, and of the others."""
    b, t, h, d, v = shape
    if op == "short_conv":
        return {"x": ((b, t, h * d), dtype), "weight": ((TAPS, h * d), dtype)}, {"segment_ids": ((b, t), "int32")}
    if op == "cross_entropy":
        return {"hidden": ((b, t, h * d), dtype), "weight": ((h * d, v), dtype)}, {"targets": ((b, t), "int32")}
    named = dict.fromkeys("qkv", ((b, t, h, d), dtype))
    if op in ("scalar_decay", "gated_deltanet"):
        named["g"] = ((b, t, h), "float32")
    elif op in ("vector_decay", "kda"):
        named["g"] = ((b, t, h, d), "float32")
    if FUNCTIONS.get(op) == "delta_rule":
        named["beta"] = ((b, t, h), dtype)
    return named, {}


def inputs(op: str, shape: Shape, dtype: str) -> tuple[Arrays, Arrays]:
    """Random arguments as `shapes` says."""
    rng = np.random.default_rng(0)

    def draw(name: str, size: tuple[int, ...], kind: str) -> jax.Array:
        if kind == "int32":
            return jnp.asarray(rng.integers(0, shape.vocabulary, size) if name == "targets" else np.ones(size), jnp.int32)
        x = rng.standard_normal(size)
        if name == "g":
            x = -np.exp(x - 3)
        elif name == "beta":
            x = 1 / (1 + np.exp(-x))
        elif name == "k":
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        elif name == "weight":
            x = x / size[0] ** 0.5
        return jnp.asarray(x, kind)

    return tuple({name: draw(name, *of) for name, of in named.items()} for named in shapes(op, shape, dtype))


def ours(op: str, implementation: str) -> Callable[[Arrays, Arrays], jax.Array]:
    """(arguments with gradients, others) to the op's main output."""
    function = getattr(kernels, FUNCTIONS.get(op, op))

    def call(x: Arrays, fixed: Arrays) -> jax.Array:
        if op == "attention":
            return function(x["q"], x["k"], x["v"], mask=Mask(), implementation=implementation)
        if op == "short_conv":
            return function(**x, at=Tokens(**fixed), implementation=implementation)[0]
        if op == "cross_entropy":
            return function(**x, **fixed, implementation=implementation)[0]
        gates = (x.get("g"), x["beta"]) if FUNCTIONS[op] == "delta_rule" else (x["g"],)
        return function(x["q"], x["k"], x["v"], *gates, implementation=implementation)[0]

    return call


def implementations(op: str) -> list[str]:
    """Registered names, the reference last and left out where it is only slow."""
    return [name for name in kernels.registered()[FUNCTIONS.get(op, op)] if name != "reference"]


def jax_peers(op: str) -> dict[str, Callable[[Arrays, Arrays], jax.Array]]:
    """The same op by other JAX libraries: jax.nn's attention, and jla (jax-linear-attention) if it is installed."""
    if op == "attention":
        backends = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
        return {
            f"jax.nn {name}": lambda x, _, name=name: jax.nn.dot_product_attention(
                x["q"], x["k"], x["v"], is_causal=True, implementation=name
            )
            for name in backends
        }
    if op in JLA_KINDS and importlib.util.find_spec("jla") is not None:
        from jla.ops import linear_attention

        names = ("mosaic_gpu", "chunked") if jax.default_backend() == "gpu" else ("chunked",)
        return {f"jla {name}": lambda x, _, name=name: linear_attention(JLA_KINDS[op], **x, impl=name)[0] for name in names}
    return {}


def torch_peers(op: str, x: Arrays) -> dict[str, Callable[[bool], None]]:
    """fla's plain torch references on the CPU: functions of whether the gradients are wanted too. They are the naive forms, no kernels.

    Their files are loaded alone, since fla itself needs Triton.
    """
    spec = importlib.util.find_spec("torch") and importlib.util.find_spec("fla")
    calls = {  # file, function, its gates
        "scalar_decay": ("simple_gla", "naive_chunk_simple_gla", ("g",)),
        "vector_decay": ("gla", "naive_recurrent_gla", ("g",)),
        "deltanet": ("delta_rule", "delta_rule_chunkwise", ("beta",)),
        "gated_deltanet": ("gated_delta_rule", "naive_chunk_gated_delta_rule", ("g", "beta")),
        "kda": ("kda", "naive_chunk_kda", ("g", "beta")),
    }
    if op not in calls or not spec or jax.default_backend() != "cpu":
        return {}
    import torch

    file, name, gates = calls[op]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = Path(spec.submodule_search_locations[0]) / "ops" / file / "naive.py"
    module_spec = importlib.util.spec_from_file_location(f"fla_naive_{file}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    head_major = op == "deltanet"
    tensors = {key: torch.tensor(np.asarray(value, np.float32)) for key, value in x.items()}
    tensors = {key: (value.transpose(1, 2).contiguous() if head_major else value) for key, value in tensors.items()}

    def run(backward: bool) -> None:
        given = {key: value.detach().requires_grad_(backward) for key, value in tensors.items()}
        o = getattr(module, name)(*(given[key] for key in ("q", "k", "v", *gates)))
        if backward:
            (o[0] if isinstance(o, tuple) else o).sum().backward()

    return {f"fla {name}": run}

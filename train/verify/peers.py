"""The same ops by other libraries, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from plait.train.verify.trials import Arrays

_JLA_KINDS = {
    "scalar_decay": "simple_gla",
    "vector_decay": "gla",
    "deltanet": "deltanet",
    "gated_deltanet": "gated_deltanet",
    "kda": "kda",
}
Peer = Callable[[Arrays], jax.Array]


def peers(name: str) -> dict[str, Peer]:
    """Functions of a timed trial's arguments to its main result, by their names: those that can be imported here."""
    if name == "attention":
        return {**_jax_nn(), **_splash()}
    if name in _JLA_KINDS and importlib.util.find_spec("jla") is not None:
        forms = ("mosaic_gpu", "chunked") if jax.default_backend() == "gpu" else ("chunked",)
        return {f"jla {form}": partial(_jla, _JLA_KINDS[name], form) for form in forms}
    return {}


def _jla(kind: str, form: str, x: Arrays) -> jax.Array:
    return importlib.import_module("jla.ops").linear_attention(kind, **x, impl=form)[0]


def _jax_nn() -> dict[str, Peer]:
    forms = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    return {f"jax.nn {form}": partial(_dot_product_attention, form) for form in forms}


def _dot_product_attention(form: Any, x: Arrays) -> jax.Array:
    return jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, implementation=form)


def _splash() -> dict[str, Peer]:
    """JAX's own kernel for TPUs, heads first."""
    if jax.default_backend() != "tpu":
        return {}
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def run(x: Arrays) -> jax.Array:
        length, heads = x["q"].shape[1:3]
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
        q, k, v = (x[name].swapaxes(1, 2) for name in ("q", "k", "v"))
        return jax.vmap(kernel)(q * q.shape[-1] ** -0.5, k, v).swapaxes(1, 2)

    return {"splash (jax)": run}

"""NVIDIA's own flash attention (cuDNN) through `jax.nn.dot_product_attention`: plain causal, windowed and full attention."""

from typing import Any

import jax

from plait.kernels.attention.reference import AttentionStats
from plait.kernels.masks import Mask
from plait.kernels.target import not_on

Array = jax.Array


def local_window(mask: Mask) -> tuple[int, int] | None:
    """The mask's window as JAX counts it: keys before the query and after it, the query itself not counted; None is no limit."""
    return None if mask.window_size is None else (mask.window_size - 1, 0 if mask.causal else mask.window_size - 1)


def unsupported(q: Array, k: Array, v: Array, *, mask: Mask, scale: float, **options: Any) -> str | None:
    """Why cuDNN cannot serve a call, or None; what the library itself refuses is asked of it."""
    if reason := not_on("gpu"):
        return reason
    if type(mask) is not Mask or mask != Mask(causal=mask.causal, window_size=mask.window_size):
        return f"it knows causal, windowed and full masks, not {mask}"
    if mask.window_size is not None and not mask.causal:
        return "its windows look back only"
    names = ("segment_ids", "positions", "kv_segment_ids", "kv_positions", "block_table", "sinks", "sigmoid_bias")
    given = [name for name in names if options.get(name) is not None]
    if options.get("return_stats"):
        given.append("return_stats")
    if given:
        return f"it takes no {', '.join(given)}"
    if not isinstance(scale, (int, float)):
        return "the scale is an array, not a number"
    try:
        jax.eval_shape(lambda q, k, v: _attend(q, k, v, mask, scale), q, k, v)
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def attention(q: Array, k: Array, v: Array, *, mask: Mask, scale: float, **options: Any) -> tuple[Array, AttentionStats | None]:
    """See `plait.kernels.attention`; the options left out are None or off."""
    return _attend(q, k, v, mask, scale), None


def _attend(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=mask.causal, local_window_size=local_window(mask), implementation="cudnn"
    )

"""Argument checks and numeric choices shared by the ops. Every message names the argument, what came, the rule and the fix."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.tokens import Tokens

Array = jax.Array


def accumulation_dtype(*arrays: Array) -> Any:
    """The dtype of states, sums and logits: float32, or float64 when an input is (tests check gradients there)."""
    return jnp.result_type(jnp.float32, *arrays)


def l2_normalize(x: Array, eps: float = 1e-6) -> Array:
    """`x / sqrt(sum(x^2) + eps)` over the last axis: the key and query normalisation of the delta-rule family."""
    wide = x.astype(accumulation_dtype(x))
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def padded(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros at the end of an axis, up to a multiple."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)


def matmul_precision(dtype: Any) -> jax.lax.Precision:
    """Precision of the large products: full for float32 inputs, the hardware's default for 16-bit ones, which are exact in it."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize < 4 else jax.lax.Precision.HIGHEST


def resolved_scale(op: str, scale: float | None, key_dim: int) -> float:
    """The factor of the logits: K^-1/2 for None. Raises ValueError unless it is a number, which a program is specialised to."""
    if scale is None:
        return key_dim**-0.5
    if not isinstance(scale, numbers.Real):
        raise ValueError(f"{op}: scale={scale} must be a number; multiply q by an array instead")
    return float(scale)


def check_shape(op: str, name: str, array: Array, expected: tuple[int, ...], legend: str) -> None:
    """Raises ValueError unless `array` has the expected shape; `legend` names the axes, such as "[B, T, Hv]"."""
    if array.shape != expected:
        raise ValueError(
            f"{op}: {name}.shape={array.shape} must be {legend} = {expected}; reshape {name} or the argument it follows"
        )


def check_rank(op: str, name: str, array: Array, legend: str) -> None:
    """Raises ValueError unless `array` has as many axes as `legend`, such as "[B, T, H, K]"."""
    if array.ndim != legend.count(",") + 1:
        raise ValueError(f"{op}: {name}.shape={array.shape} must be {legend}; add or drop axes")


def check_divides(op: str, small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises ValueError unless `small` divides `large`, naming the values that would do."""
    if small == 0 or large % small:
        allowed = [n for n in range(1, large + 1) if large % n == 0]
        raise ValueError(f"{op}: {small_name}={small} must divide {large_name}={large}; use one of {allowed}")


def check_tokens(op: str, name: str, tokens: Tokens | None, batch: int, length: int, *, in_order: bool = True) -> None:
    """Raises ValueError unless the known fields are int [B, T], segment ids at least 0 and, `in_order` and of known values, no
    segment returns after another began."""
    if tokens is None:
        return
    for field in ("segment_ids", "positions"):
        array, path = getattr(tokens, field), f"{name}.{field}"
        if array is None:
            continue
        check_shape(op, path, array, (batch, length), "[B, T]")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{op}: {path}.dtype={array.dtype} must be an integer type; cast it to int32")
    ids = tokens.segment_ids
    if not in_order or not _is_known(ids):
        return
    for row, known in enumerate(np.asarray(ids)):
        real = known[known != 0]
        starts = real[np.flatnonzero(np.diff(real, prepend=-1))]
        if (real < 0).any() or len(set(starts.tolist())) < len(starts):
            raise ValueError(
                f"{op}: {name}.segment_ids[{row}] holds runs {starts.tolist()}; ids must be at least 0 and each segment contiguous; "
                "number the segments in order"
            )


def check_floating(op: str, **arrays: Array) -> None:
    """Raises ValueError unless the named arrays hold floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{op}: {name}.dtype={array.dtype} must be a floating-point type; cast it to float32 or bfloat16")


def check_log_decay(op: str, g: Array | None) -> None:
    """Raises ValueError where a log decay whose values are known is above 0: the state would grow without bound."""
    if not _is_known(g):
        return
    largest = float(np.max(np.asarray(g, np.float32), initial=-np.inf))
    if largest > 0:
        raise ValueError(f"{op}: g holds {largest:.3g}; a log decay must be at most 0; pass log(decay) of decays in (0, 1]")


def _is_known(x: Any) -> bool:
    """Whether the values of an array can be looked at here."""
    return (
        isinstance(x, (np.ndarray, jax.Array)) and not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    )


def check_chunk_size(op: str, chunk_size: int) -> None:
    """Raises ValueError unless `chunk_size` is a power of two (chunks are halved recursively)."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size={chunk_size} must be a power of two; use 16, 32, 64 or 128")

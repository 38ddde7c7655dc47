"""The one rule by which a number is accepted, by tests and by `launch.py verify`.

error = RMS(actual - exact) / RMS(exact), where `exact` is the plain reference in float64 on the same, already rounded inputs.
It may be at most `MULTIPLE` times the error that the plain reference makes when it runs in the tested dtype. That error counts at
least as one rounding to the dtype (RMS about eps / 4), since a lucky reference would forbid every other order of summation.
Where the plain error is not at hand (two forms of one thing are compared), `CHAINED` stands for it: what a few hundred roundings
leave.
Raising a number here needs a sentence of why in the change that does it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MULTIPLE = 8.0
"""Three bits: a chunk form sums in another order, and through the inverse of its triangular matrix (with beta up to 2 the largest
ratio seen is 5.0)."""

CHAINED = {"float64": 2.0**-46, "float32": 2.0**-18, "bfloat16": 2.0**-7}


def one_rounding(dtype: Any) -> float:
    """The RMS relative error of rounding once to `dtype`."""
    return float(jnp.finfo(dtype).eps) / 4


def rms_error(actual: Any, exact: Any) -> float:
    """RMS of the difference over the RMS of `exact`; the plain RMS of the difference where that is zero."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape, f"shapes differ: {actual.shape} and {exact.shape}"
    scale = np.sqrt(np.mean(np.square(exact))) if exact.size else 0.0
    return float(np.sqrt(np.mean(np.square(actual - exact))) / (scale or 1.0)) if exact.size else 0.0


def bound(dtype: Any, plain_error: float | None = None) -> float:
    """Largest allowed error in `dtype`, given the plain reference's own error in it; None where that is not known."""
    return MULTIPLE * (CHAINED[np.dtype(dtype).name] if plain_error is None else max(plain_error, one_rounding(dtype)))


def wave(x: jax.Array) -> jax.Array:
    """A fixed cotangent for a result: the same numbers, those of float32, whatever the dtype that they are taken in."""
    return jnp.asarray((np.cos(np.arange(x.size) % 97 * 1.7)).astype(np.float32).reshape(x.shape), x.dtype)

"""The one rule by which the tests accept a number; no test has a tolerance of its own.

error = RMS(actual - exact) / RMS(exact), where `exact` is the plain reference in float64 on the same, already rounded inputs.
It may be at most `MULTIPLE` times the error that the plain reference makes when it runs in the tested dtype. That error counts at
least as one rounding to the dtype (RMS about eps / 4), since a lucky reference would forbid every other order of summation.
Where the plain error is not at hand (two forms of one thing are compared), `CHAINED` stands for it: what a few hundred roundings
leave.
Raising a number here needs a sentence of why in the change that does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

MULTIPLE = 8.0
"""Three bits: a chunk form sums in another order, and through the inverse of its triangular matrix (with beta up to 2 the largest
ratio seen is 4.1)."""

CHAINED = {"float64": 2.0**-46, "float32": 2.0**-18, "bfloat16": 2.0**-7}


def one_rounding(dtype: Any) -> float:
    """The RMS relative error of rounding once to `dtype`."""
    return float(ml_dtypes.finfo(dtype).eps) / 4


def rms_error(actual: Any, exact: Any) -> float:
    """RMS of the difference over the RMS of `exact`; the plain RMS of the difference where that is zero."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape, f"shapes differ: {actual.shape} and {exact.shape}"
    scale = np.sqrt(np.mean(np.square(exact))) if exact.size else 0.0
    return float(np.sqrt(np.mean(np.square(actual - exact))) / (scale or 1.0)) if exact.size else 0.0


def bound(dtype: Any, plain_error: float | None = None) -> float:
    """Largest allowed error in `dtype`, given the plain reference's own error in it; None where that is not known."""
    return MULTIPLE * (CHAINED[np.dtype(dtype).name] if plain_error is None else max(plain_error, one_rounding(dtype)))


def assert_close(actual: Any, reference: Any, *, plain: Any = None, dtype: Any = None, err_msg: str = "") -> None:
    """Raises AssertionError unless the array `actual` keeps the rule.

    Args:
      actual: the tested result.
      reference: the exact result, or another form's.
      plain: the plain reference run in the tested dtype, if there is one.
      dtype: the tested dtype, that of the inputs; None is that of `actual`.
      err_msg: begins the message.
    """
    dtype = np.dtype(getattr(actual, "dtype", "float32") if dtype is None else dtype)
    limit = bound(dtype if dtype.name in CHAINED else "float32", None if plain is None else rms_error(plain, reference))
    error = rms_error(actual, reference)
    worst = np.max(np.abs(np.asarray(actual, np.float64) - np.asarray(reference, np.float64)), initial=0.0)
    assert error <= limit, f"{err_msg or 'error'} {error:.2e} exceeds {limit:.2e} ({dtype.name}); largest difference {worst:.2e}"


def assert_statistics_close(actual: Any, reference: Any, err_msg: str = "") -> None:
    """Raises AssertionError unless statistics are NaN in the same places and keep the rule elsewhere."""
    missing = np.isnan(np.asarray(reference))
    np.testing.assert_array_equal(np.isnan(np.asarray(actual)), missing, err_msg=err_msg)
    assert_close(np.where(missing, 0, actual), np.where(missing, 0, reference), err_msg=err_msg)


def assert_tree_close(actual: Any, exact: Any, plain: Any, *, dtype: Any) -> None:
    """`assert_close` on each leaf of three trees of one structure; the message names the leaf and all that fail are listed."""
    failures = []
    for (path, got), want, own in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(exact), jax.tree.leaves(plain), strict=True
    ):
        try:
            assert_close(got, want, plain=own, dtype=dtype, err_msg=jax.tree_util.keystr(path))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def in_float64(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` with every floating argument widened to float64, as NumPy arrays; the `exact` of the rule."""
    with jax.enable_x64(True):
        widen = lambda x: jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)
        return jax.tree.map(np.asarray, function(*jax.tree.map(widen, args)))

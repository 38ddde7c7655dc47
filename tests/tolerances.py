"""The rule of `plait.kernels.tolerances` as assertions; no test has a tolerance of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.tolerances import CHAINED, bound, rms_error


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

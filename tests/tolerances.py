"""The one rule by which the tests accept a number; no test has a tolerance of its own.

error = RMS(actual - reference) / RMS(reference), the reference in float32 (or better). It may be at most `MULTIPLE` times the error that
the plain reference makes when it runs in the tested dtype on the same inputs. Where that error is not at hand (two float32 forms of one
thing), `ROUNDING` of the dtype stands for it: what a few hundred chained roundings leave. Raising a number here needs a sentence of why.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MULTIPLE = 4.0
ROUNDING = {"float32": 2.0**-18, "bfloat16": 2.0**-7}


def rms_error(actual: Any, reference: Any) -> float:
    """RMS of the difference over the RMS of the reference; the plain RMS of the difference where the reference is zero."""
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape, f"shapes differ: {actual.shape} and {reference.shape}"
    scale = np.sqrt(np.mean(np.square(reference))) if reference.size else 0.0
    return float(np.sqrt(np.mean(np.square(actual - reference))) / (scale or 1.0)) if reference.size else 0.0


def bound(dtype: Any, plain_error: float = 0.0) -> float:
    """Largest allowed error for a result of `dtype`, given the plain reference's own error in that dtype."""
    return MULTIPLE * max(plain_error, ROUNDING[np.dtype(dtype).name])


def assert_close(actual: Any, reference: Any, *, plain: Any = None, err_msg: str = "") -> None:
    """Raises AssertionError unless `actual` keeps the rule. `plain` is the plain reference run in the dtype of `actual`, if there is one."""
    dtype = getattr(actual, "dtype", np.dtype("float32"))
    dtype = dtype if np.dtype(dtype).name in ROUNDING else np.dtype("float32")
    limit = bound(dtype, 0.0 if plain is None else rms_error(plain, reference))
    error = rms_error(actual, reference)
    worst = np.max(np.abs(np.asarray(actual, np.float64) - np.asarray(reference, np.float64)), initial=0.0)
    assert error <= limit, (
        f"{err_msg or 'error'} {error:.2e} exceeds {limit:.2e} ({np.dtype(dtype).name}); largest difference {worst:.2e}"
    )

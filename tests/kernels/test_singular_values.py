"""Singular values by plain operations against LAPACK's in float64, and that nothing of LAPACK is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels.singular_values import singular_values
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close


def made_of(values, rows, columns):
    """A matrix with these singular values, float32."""
    rng = np.random.default_rng(rows + columns)
    left, right = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in (rows, columns))
    return np.float32((left * values) @ right.T)


def drawn(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


MATRICES = {
    "square": drawn(3, 2, 16, 16),
    "wide": drawn(2, 7, 40),
    "tall": drawn(2, 40, 7) * np.float32([1e-20, 1e18])[:, None, None],
    "one column": drawn(9, 1),
    "conditioned badly": made_of(np.logspace(3, -3, 16), 16, 24),
    "of low rank": drawn(24, 3) @ drawn(3, 32),
    "repeated": made_of([2.0] * 8 + [1.0] * 8, 16, 16),
    "of rows of many sizes": drawn(12, 16) * np.logspace(0, -22, 12, dtype=np.float32)[::-1, None],
    "all one": np.ones((8, 12), np.float32),
    "diagonal": np.diag(np.float32([0, 3, 3, 0, 5])),
    "zero": np.zeros((2, 4, 4), np.float32),
    "bfloat16": jnp.asarray(drawn(16, 20), jnp.bfloat16),
}


@pytest.mark.parametrize("name", MATRICES)
def test_values_are_those_of_float64(name):
    x = MATRICES[name]
    exact = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    got = quick_jit(singular_values)(x)
    assert got.dtype == jnp.float32
    for one, want in zip(got.reshape(-1, got.shape[-1]), exact.reshape(-1, got.shape[-1]), strict=True):
        assert_close(one, want)
        assert (np.diff(one) <= 0).all()


def test_what_is_not_finite_stays_so():
    assert np.isnan(quick_jit(singular_values)(np.full((3, 4), np.nan, np.float32))).all()


def test_no_library_is_called():
    text = jax.jit(singular_values).lower(jnp.ones((4, 5))).as_text()
    assert "custom_call" not in text and "while" in text

"""Triangles and orthonormal rows by plain operations against LAPACK's, and that nothing of LAPACK is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels.reflections import lower_triangle, orthonormal_rows
from plait.models.build import orthogonal
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close


def drawn(*shape):
    return np.float32(np.random.default_rng(0).normal(size=shape))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
def test_triangle_has_the_products_of_the_rows(shape):
    x = drawn(2, *shape)
    made = quick_jit(lower_triangle)(x)
    assert made.shape == (2, shape[0], min(shape)) and not np.triu(made, 1).any()
    exact = np.float64(x)
    assert_close(np.float32(np.float64(made) @ np.float64(made).swapaxes(1, 2)), exact @ exact.swapaxes(1, 2))


@pytest.mark.parametrize("shape", [(1, 7), (5, 12), (6, 6)])
def test_rows_are_those_of_float64(shape):
    x = drawn(2, *shape)
    q, r = np.linalg.qr(np.float64(x).swapaxes(1, 2))
    signs = np.sign(np.diagonal(r, axis1=1, axis2=2))
    assert_close(quick_jit(orthonormal_rows)(x), (q * signs[:, None]).swapaxes(1, 2))


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (8, 8)])
def test_an_orthogonal_start_is_that_of_jax(shape):
    start = lambda init: quick_jit(lambda key: init(key, shape, jnp.float32))(jax.random.key(3))
    assert_close(start(orthogonal(0.3)), start(jax.nn.initializers.orthogonal(0.3)))


@pytest.mark.parametrize("function", [lower_triangle, orthonormal_rows])
def test_no_library_is_called(function):
    text = jax.jit(function).lower(jnp.ones((4, 5))).as_text()
    assert "custom_call" not in text and "while" in text

"""Small positive systems against LAPACK's solution, with gradients, and on several devices at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from plait.kernels.positive_solve import positive_solve
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close, in_float64


def systems(*batch: int, size: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Matrices whose eigenvalues lie in [1, 1 + spread size], and right sides, in float64."""
    rng = np.random.default_rng(size)
    half = rng.normal(size=(*batch, size, size))
    return np.eye(size) + spread * half @ half.swapaxes(-1, -2) / size, rng.normal(size=(*batch, size))


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_solution_and_gradients_are_those_of_lapack(size):
    a, b = systems(3, 2, size=size)
    weights = np.random.default_rng(0).normal(size=b.shape)
    reference = lambda a, b: jnp.linalg.solve(a, b[..., None])[..., 0]
    loss = lambda solve: lambda a, b: (solve((a + jnp.swapaxes(a, -1, -2)) / 2, b) * weights.astype(b.dtype)).sum()
    assert_close(quick_jit(positive_solve)(*map(jnp.float32, (a, b))), np.float32(np.linalg.solve(a, b[..., None])[..., 0]))
    got = quick_jit(jax.grad(loss(positive_solve), (0, 1)))(*map(jnp.float32, (a, b)))
    for gradient, expected in zip(got, in_float64(jax.grad(loss(reference), (0, 1)), a, b), strict=True):
        assert_close(gradient, np.float32(expected))


def test_an_ill_conditioned_system_is_solved_by_the_rule():
    a, b = map(np.float32, systems(64, size=16, spread=1e5))
    exact = np.linalg.solve(np.float64(a), np.float64(b)[..., None])[..., 0]
    by_lapack = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), b[..., None])[..., 0]
    assert_close(quick_jit(positive_solve)(a, b), exact, plain=by_lapack)


def test_devices_solve_at_once():
    a, b = map(np.float32, systems(8, 4, size=5))
    mesh = jax.make_mesh((8,), ("data",))
    placed = jax.device_put((a, b), NamedSharding(mesh, PartitionSpec("data")))
    x = quick_jit(positive_solve)(*placed)
    assert len(x.sharding.device_set) == 8
    np.testing.assert_array_equal(x, quick_jit(positive_solve)(a, b))

"""Local linear attention against its papers' formulas, a regression, and itself in another form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, attention, local_linear, local_linear_rows
from plait.kernels.local_linear import chunked
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

CAUSAL = Mask(causal=True)


def inputs(length: int = 9, heads: int = 2, kv_heads: int = 1, dim: int = 4, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and probes in float64."""
    rng = np.random.default_rng(seed)
    shapes = ((2, length, heads, dim), (2, length, kv_heads, dim), (2, length, kv_heads, 3), (2, length, heads, dim))
    return tuple(rng.normal(size=shape) for shape in shapes)


def papers_row(q: np.ndarray, k: np.ndarray, ridge: float) -> np.ndarray:
    """The weights of one query on its keys, as the paper writes them."""
    s = k @ q / len(q) ** 0.5
    w, z = np.exp(s - s.max()), k - q
    omega, mu = w.sum(), w @ z
    sigma = np.einsum("j,jk,jl->kl", w, z, z) + ridge * np.eye(len(q))
    rho = np.linalg.solve(sigma, mu)
    return w * (1 - z @ rho) / (omega - mu @ rho)


@pytest.mark.proves("lla")
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_local_linear_attention_is_the_papers_formula_token_by_token(implementation):
    q, k, v, _ = inputs()
    run = lambda q, k, v: local_linear(q, k, v, mask=CAUSAL, ridge=0.3, implementation=implementation)
    o = in_float64(run, q, k, v)
    a = in_float64(lambda q, k: local_linear_rows(q, k, jnp.arange(9), mask=CAUSAL, ridge=0.3), q, k)
    for b in range(2):
        for h in range(2):
            for t in range(9):
                row = papers_row(q[b, t, h], k[b, : t + 1, 0], 0.3)
                np.testing.assert_allclose(o[b, t, h], row @ v[b, : t + 1, 0], rtol=1e-9, atol=1e-11)
                np.testing.assert_allclose(a[b, h, t, : t + 1], row, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("lla")
def test_local_linear_attention_is_a_weighted_least_squares_fit_read_at_the_query():
    q, k, v, _ = inputs()
    o = in_float64(lambda *x: local_linear(*x, mask=CAUSAL, ridge=0.3), q, k, v)
    t, h, keys = 8, 1, k[0, :, 0]
    s = keys @ q[0, t, h] / 2
    root = np.sqrt(np.exp(s - s.max()))[:, None]
    design = np.concatenate([np.ones((9, 1)), keys - q[0, t, h]], axis=1) * root
    penalty = np.sqrt(0.3) * np.eye(5)[1:]  # of the slope, not of the intercept
    fit = np.linalg.lstsq(np.concatenate([design, penalty]), np.concatenate([v[0, :, 0] * root, np.zeros((4, 3))]), rcond=None)[0]
    np.testing.assert_allclose(o[0, t, h], fit[0], rtol=1e-9)


def test_local_linear_attention_is_exact_on_affine_values_and_softmax_attention_under_a_large_ridge():
    q, k, _, _ = inputs(length=24)
    slope, offset = np.random.default_rng(1).normal(size=(4, 3)), np.array([1.0, -2, 3])
    affine = k @ slope + offset
    o = in_float64(lambda *x: local_linear(*x, mask=CAUSAL, ridge=1e-10), q, k, affine)
    np.testing.assert_allclose(o[:, 12:], (q @ slope + offset)[:, 12:], rtol=1e-5, atol=1e-5)
    large = in_float64(lambda *x: local_linear(*x, mask=CAUSAL, ridge=1e12), q, k, affine)
    np.testing.assert_allclose(large, in_float64(lambda *x: attention(*x, mask=CAUSAL), q, k, affine), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"ridge": 0.5}, {"probe": True}], ids=["ridge", "probe"])
def test_rows_sum_to_1_and_may_be_negative(options):
    q, k, _, r = (jnp.asarray(x, jnp.float32) for x in inputs())
    options = {"probe": r} if "probe" in options else options
    a = local_linear_rows(q, k, jnp.arange(9), mask=CAUSAL, **options)
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-4)
    assert (np.asarray(a) < 0).any()


@pytest.mark.parametrize("option", ["ridge", "probe"])
def test_blocks_of_queries_equal_all_at_once_with_gradients_in_packed_documents(option, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_BLOCK", 8)
    at = layout((7, 12), (15,), length=20)

    def values_and_gradients(implementation):
        def run(q, k, v, r):
            options = {"ridge": 0.7} if option == "ridge" else {"probe": r}
            o = local_linear(q, k, v, mask=CAUSAL, at=at, implementation=implementation, **options)
            return o, jnp.sum(jnp.sin(o) * (jnp.arange(20) % 3 + 1.0)[None, :, None, None])

        return quick_jit(lambda *x: (run(*x)[0], jax.grad(lambda *x: run(*x)[1], argnums=(0, 1, 2))(*x)))

    arrays = tuple(jnp.asarray(x, jnp.float32) for x in inputs(length=20))
    got, plain = (values_and_gradients(name)(*arrays) for name in ("chunked", "reference"))
    exact = in_float64(values_and_gradients("reference"), *arrays)
    assert_tree_close(got, exact, plain, dtype="float32")
    assert not np.asarray(got[0])[np.asarray(at.segment_ids) == 0].any()


def test_solves_are_float32_where_queries_and_keys_are_bfloat16():
    """Equal keys but for a little: in bfloat16 their covariance would be noise."""
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(length=40))
    k = jnp.asarray(4 + 0.25 * k.astype(jnp.float32), jnp.bfloat16)
    run = lambda *x: local_linear(*x, mask=CAUSAL, ridge=0.01)
    exact = in_float64(run, q, k, v)
    assert_close(run(q, k, v), exact, plain=exact, dtype="bfloat16")


def test_a_call_needs_a_probe_or_a_ridge_above_0():
    q, k, v, r = (jnp.asarray(x, jnp.float32) for x in inputs())
    for options, message in (
        ({}, "probe and ridge=None must not both be there or be missing"),
        ({"probe": r, "ridge": 1.0}, "probe and ridge=1.0 must not both"),
        ({"ridge": 0.0}, "ridge=0.0 must be above 0"),
        ({"probe": r[:, :4]}, r"probe.shape=\(2, 4, 2, 4\) must be"),
    ):
        with pytest.raises(ValueError, match=message):
            local_linear(q, k, v, mask=CAUSAL, **options)

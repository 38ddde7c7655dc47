"""Local linear attention against its paper's formula and a regression, Parallax against fla, and what both promise."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Mask, Tokens, attention, weighted_attention, weighted_rows
from plait.kernels.weighted_attention import chunked
from plait.models.build import BuildContext
from plait.models.mixers.full.lla import LLAConfig, LocalRegression
from plait.models.mixers.full.parallax import ParallaxConfig, Probed
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_maps
from plait.tests.models.golden.generate_maps import WIDTH
from plait.tests.models.mixers.linear.oracle import assert_agrees, dense, read
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

CAUSAL = Mask(causal=True)


def inputs(length: int = 9, heads: int = 2, kv_heads: int = 1, dim: int = 4, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and probes in float64."""
    rng = np.random.default_rng(seed)
    shapes = ((2, length, heads, dim), (2, length, kv_heads, dim), (2, length, kv_heads, 3), (2, length, heads, dim))
    return tuple(rng.normal(size=shape) for shape in shapes)


def regression(q, k, v, ridge, **options):
    """Head outputs of local linear attention."""
    return weighted_attention(q, k, v, mask=CAUSAL, rule=LocalRegression(ridge), **options)


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
    run = lambda q, k, v: regression(q, k, v, 0.3, implementation=implementation)
    o = in_float64(run, q, k, v)
    a = in_float64(lambda q, k: weighted_rows(q, k, jnp.arange(9), mask=CAUSAL, rule=LocalRegression(0.3)), q, k)
    for b in range(2):
        for h in range(2):
            for t in range(9):
                row = papers_row(q[b, t, h], k[b, : t + 1, 0], 0.3)
                np.testing.assert_allclose(o[b, t, h], row @ v[b, : t + 1, 0], rtol=1e-9, atol=1e-11)
                np.testing.assert_allclose(a[b, h, t, : t + 1], row, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("lla")
def test_local_linear_attention_is_a_weighted_least_squares_fit_read_at_the_query():
    q, k, v, _ = inputs()
    o = in_float64(lambda *x: regression(*x, 0.3), q, k, v)
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
    o = in_float64(lambda *x: regression(*x, 1e-10), q, k, affine)
    np.testing.assert_allclose(o[:, 12:], (q @ slope + offset)[:, 12:], rtol=1e-5, atol=1e-5)
    large = in_float64(lambda *x: regression(*x, 1e12), q, k, affine)
    np.testing.assert_allclose(large, in_float64(lambda *x: attention(*x, mask=CAUSAL), q, k, affine), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lla", "parallax"])
def test_rows_sum_to_1_and_may_be_negative(name):
    q, k, _, r = (jnp.asarray(x, jnp.float32) for x in inputs())
    rule, q = (LocalRegression(0.5), q) if name == "lla" else (Probed(), jnp.concatenate([q, r], axis=-1))
    a = weighted_rows(q, k, jnp.arange(9), mask=CAUSAL, rule=rule)
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-4)
    assert (np.asarray(a) < 0).any()


def test_blocks_of_queries_equal_all_at_once_with_gradients_in_packed_documents(monkeypatch):
    monkeypatch.setattr(chunked, "DENSE_TILE", 1)
    monkeypatch.setattr(chunked, "BLOCK_SIZE", 8)
    at = layout((7, 12), (15,), length=20)

    def values_and_gradients(implementation):
        def run(q, k, v):
            o = regression(q, k, v, 0.7, at=at, implementation=implementation)
            return o, jnp.sum(jnp.sin(o) * (jnp.arange(20) % 3 + 1.0)[None, :, None, None])

        return quick_jit(lambda *x: (run(*x)[0], jax.grad(lambda *x: run(*x)[1], argnums=(0, 1, 2))(*x)))

    arrays = tuple(jnp.asarray(x, jnp.float32) for x in inputs(length=20)[:3])
    got, plain = (values_and_gradients(name)(*arrays) for name in ("chunked", "reference"))
    assert_tree_close(got, in_float64(values_and_gradients("reference"), *arrays), plain, dtype="float32")
    assert not np.asarray(got[0])[np.asarray(at.segment_ids) == 0].any()


def test_solves_are_float32_where_queries_and_keys_are_bfloat16():
    """Weights, float32 themselves, have the accuracy of float32, by the paper's formula on the same rounded queries and keys."""
    q, k, _, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(length=40))
    got = weighted_rows(q, k, jnp.arange(40), mask=CAUSAL, rule=LocalRegression(0.1))
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for t in range(4, 40):
        assert_close(got[0, 1, t, : t + 1], papers_row(q[0, t, 1], k[0, : t + 1, 0], 0.1), dtype="float32")


def assert_parallax(arrays):
    config = ParallaxConfig(num_heads=4, num_kv_heads=2, head_dim=WIDTH // 4, positions=None)
    assert_agrees(config, dense(arrays, **{name: f"{name}_proj" for name in "qrkvo"}), arrays)


@pytest.mark.proves("parallax")
def test_parallax_is_flas():
    """Also that r . k is not scaled: that would be another output."""
    assert_parallax(read("parallax"))


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("fla") is None, reason="needs torch and fla"
)
def test_parallax_is_flas_live():
    assert_parallax(generate_maps.parallax(seed=7))


def new(config, **options):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=9, **options))


X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, WIDTH)), jnp.float32)


@pytest.mark.parametrize("config", [ParallaxConfig, LLAConfig], ids=lambda config: config.name)
def test_it_begins_as_softmax_attention_or_ends_there(config):
    """Parallax whose probe is as new, and local linear attention under a large ridge."""
    options = {"ridge": 1e6} if config is LLAConfig else {}
    mixer = new(config(num_heads=2, head_dim=8, **options))
    inputs, _ = mixer.project(X, at=Tokens().placed(1, 9), state=None)
    o, _ = mixer.attend(inputs, at=Tokens(), state=None)
    expected = attention(inputs.q[..., :8], inputs.k, inputs.v, mask=Mask(causal=True))
    if config is ParallaxConfig:
        assert_close(o, expected)
    np.testing.assert_allclose(o, expected, atol=1e-4)


def test_a_probe_under_sigma_reparam_has_a_direction():
    """A matrix of zeros has no largest singular value to be divided by."""
    mixer = new(ParallaxConfig(num_heads=2, head_dim=8), sigma_reparam="spectral")
    assert np.isfinite(mixer(X, at=Tokens(), carry={}).y).all()


@pytest.mark.parametrize("config", [ParallaxConfig, LLAConfig], ids=lambda config: config.name)
def test_key_heads_that_do_not_divide_the_query_heads_are_refused(config):
    with pytest.raises(ValueError, match=r"num_kv_heads=3 must divide num_heads=4; use one of 1, 2, 4"):
        config(num_heads=4, num_kv_heads=3, head_dim=16).fit(64)


def test_a_ridge_of_0_is_refused():
    with pytest.raises(ValueError, match=r"ridge=0\.0 must be"):
        LLAConfig(ridge=0.0)

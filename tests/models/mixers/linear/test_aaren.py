"""Aaren against the paper's scan, and softmax attention of one query over prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.linear.aaren import AarenConfig

WIDTH, LENGTH = 16, 12


def new(**options):
    config = AarenConfig(num_heads=2, head_dim=8)
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, **options))


def scores_values_and_outputs(x):
    """s `[T, H]`, v `[T, H, V]` and the head outputs `[T, H, V]` of one sequence, float64."""
    mixer, at = new(), Tokens().placed(1, LENGTH)
    inputs, _ = mixer.project(x[None], at=at, state=None)
    o, _ = mixer.attend(inputs, at=at, state=None)
    k = np.asarray(mixer.heads(mixer.k(x[None]))[0], np.float64)
    s = np.einsum("thk,hk->th", k, np.asarray(mixer.query[...], np.float64)) / 8**0.5
    return s, np.asarray(inputs.v[0], np.float64), np.asarray(o[0], np.float64)


X = jnp.asarray(np.random.default_rng(0).normal(size=(LENGTH, WIDTH)), jnp.float32)


@pytest.mark.proves("aaren")
def test_aaren_is_the_papers_scan():
    s, v, o = scores_values_and_outputs(X)

    def combine(a, b):
        m = np.maximum(a[0], b[0])
        u, w = (a[i] * np.exp(a[0] - m) + b[i] * np.exp(b[0] - m) for i in (1, 2))
        return m, u, w

    for h in range(2):
        whole = None
        for t in range(LENGTH):
            one = (s[t, h], 1.0, v[t, h])
            whole = one if whole is None else combine(whole, one)
            np.testing.assert_allclose(o[t, h], whole[2] / whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.proves("aaren")
def test_aaren_is_softmax_attention_over_prefixes():
    s, v, o = scores_values_and_outputs(X)
    for t in range(LENGTH):
        weights = np.exp(s[: t + 1] - s[: t + 1].max(0))
        np.testing.assert_allclose(o[t], np.einsum("th,thv->hv", weights / weights.sum(0), v[: t + 1]), rtol=1e-5, atol=1e-6)


def test_scores_beyond_the_range_of_exp_neither_overflow_nor_lose_a_token():
    s, v, o = scores_values_and_outputs(400 * X)
    assert np.abs(s).max() > 200
    for t in range(LENGTH):
        weights = np.exp(s[: t + 1] - s[: t + 1].max(0))
        np.testing.assert_allclose(o[t], np.einsum("th,thv->hv", weights / weights.sum(0), v[: t + 1]), rtol=1e-3, atol=1e-2)
    mixer = new()
    _, pull = jax.vjp(lambda x: mixer(x, at=Tokens(), carry={}).y, 400 * X[None])
    assert np.isfinite(pull(jnp.ones((1, LENGTH, WIDTH)))[0]).all()


def test_the_query_is_a_parameter_that_no_token_changes_and_that_does_not_decay():
    mixer = new()
    assert mixer.query.shape == (2, 8)
    assert mixer.query.get_metadata()["role"] == "vector"

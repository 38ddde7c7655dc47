"""Parallax against fla, and what it and local linear attention promise."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Mask, Tokens, attention
from plait.models.build import BuildContext
from plait.models.mixers.full.lla import LLAConfig
from plait.models.mixers.full.parallax import ParallaxConfig
from plait.tests.models.golden import generate_maps
from plait.tests.models.golden.generate_maps import WIDTH
from plait.tests.models.mixers.linear.oracle import assert_agrees, dense, read
from plait.tests.tolerances import assert_close


def assert_parallax(arrays):
    config = ParallaxConfig(num_heads=4, num_kv_heads=2, head_dim=WIDTH // 4, rope_theta=None)
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
    expected = attention(inputs.q, inputs.k, inputs.v, mask=Mask(causal=True))
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

"""Lower bounds of forget gates that are sums over all layers: against the sums as they are published, and inside a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.layers.decays import SharedBounds
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import build, quick_jit
from plait.tests.tolerances import assert_close

WIDTH = 16
BOUNDED = HGRN2Config(head_dim=8, lower_bounds="model")


def bounds_of(scores: jax.Array) -> jax.Array:
    """As HGRN2 writes them."""
    shares = jax.nn.softmax(scores, axis=0)
    return jnp.cumsum(shares, axis=0) - shares[:1]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_bounds_are_partial_sums_of_one_softmax(layers):
    module = SharedBounds(BuildContext(rngs=nnx.Rngs(0), seq_len=1, num_layers=layers), WIDTH)
    assert_close(jax.nn.sigmoid(module()), jnp.broadcast_to(jnp.arange(layers)[:, None] / layers, (layers, WIDTH)))
    graph, _ = nnx.split(module)
    scores = 3 * jax.random.normal(jax.random.key(0), (layers, WIDTH))

    def ours(scores):
        return jax.nn.sigmoid(nnx.merge(graph, nnx.State({"scores": nnx.Param(scores)}))())

    assert_close(ours(scores), bounds_of(scores))
    np.testing.assert_array_equal(ours(scores)[0], 0)
    found, expected = (jax.grad(lambda s, f=f: jnp.sin(5 * f(s)).sum())(scores) for f in (ours, bounds_of))
    assert_close(found, expected)


@pytest.mark.parametrize(
    "mixers",
    [{"hgrn2": BOUNDED}, {"moh+hgrn2": MoHConfig(mixer=BOUNDED, num_shared_heads=1, top_k=1)}],
    ids=["alone", "within"],
)
def test_every_layer_of_a_model_moves_the_bounds(mixers):
    (name,) = mixers
    model = build(
        LMConfig(d_model=WIDTH, num_layers=4, pattern=name, mixers=mixers, channel_mixer=None, vocab_size=32), seq_len=8
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)
    loss = lambda params: jnp.sin(nnx.merge(graph, params, rest)(Tokens(ids))[0]).sum()
    gradient = quick_jit(jax.grad(loss))(params)["shared"]["lower_bounds"]["scores"][...]
    assert gradient.shape == (4, WIDTH) and np.isfinite(gradient).all() and np.abs(gradient).min() > 0
    assert_close(gradient[0], -gradient[1:].sum(0))  # a softmax does not see what all scores share


def test_bounds_are_one_for_all_layers():
    model = LMConfig(d_model=WIDTH, num_layers=3, pattern="hgrn2,hgrn2/b", mixers={"hgrn2": BOUNDED, "hgrn2/b": BOUNDED})
    assert list(model.shared) == ["lower_bounds"]
    assert not dataclasses.replace(model, pattern="gla", mixers={}).shared

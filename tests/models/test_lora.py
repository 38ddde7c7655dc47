"""Low-rank adapters of the one projection: where they begin, how they scale, and what is computed for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.lora import LoRAConfig
from plait.tests.tolerances import assert_close

IN, OUT, RANK = 24, 40, 5


def dense(sigma_reparam=None, role="matrix", **options) -> Dense:
    lora = LoRAConfig(rank=RANK, **options)
    ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(3), seq_len=8, sigma_reparam=sigma_reparam, lora=lora)
    return Dense(ctx, IN, OUT, ("embed", "mlp"), use_bias=True, role=role)


def moved(layer: Dense) -> Dense:
    layer.lora_b[...] = jax.random.normal(jax.random.key(1), (RANK, OUT))
    layer.bias[...] = jax.random.normal(jax.random.key(2), (OUT,))
    return layer


X = jax.random.normal(jax.random.key(0), (7, IN))


@pytest.mark.parametrize("sigma_reparam", [None, "one"])
def test_step_0_is_the_layer_itself(sigma_reparam):
    layer = dense(sigma_reparam)
    plain = X @ layer._without_adapter()
    np.testing.assert_array_equal(layer(X), plain + layer.bias[...][None])
    np.testing.assert_array_equal(layer.weight(), layer._without_adapter())


def test_the_first_matrix_is_uniform_and_the_second_zero():
    a = np.asarray(dense().lora_a[...])
    assert a.shape == (IN, RANK) and np.abs(a).max() <= IN**-0.5 and np.abs(a).max() > 0.9 * IN**-0.5
    assert not np.asarray(dense().lora_b[...]).any()


@pytest.mark.parametrize(("scaling", "scale"), [("lora", 16 / RANK), ("rslora", 16 / RANK**0.5)])
@pytest.mark.parametrize("sigma_reparam", [None, "spectral"])
def test_what_an_adapter_adds_apart_and_merged(scaling, scale, sigma_reparam):
    layer = moved(dense(sigma_reparam, scaling=scaling))
    plain = layer._without_adapter() + scale * layer.lora_a[...] @ layer.lora_b[...]
    assert_close(layer(X), X @ plain + layer.bias[...][None])
    assert_close(layer.weight(), plain)


def test_no_gradient_of_the_matrix_is_computed():
    graph, adapters, rest = nnx.split(moved(dense()), lambda path, value: "lora" in str(path[-1]), ...)
    loss = lambda adapters, x: jnp.square(nnx.merge(graph, adapters, rest)(x)).sum()
    shapes = [out.aval.shape for line in jax.make_jaxpr(jax.grad(loss))(adapters, X).eqns for out in line.outvars]
    assert (IN, RANK) in shapes and (IN, OUT) not in shapes


@pytest.mark.parametrize(("role", "has"), [("matrix", True), ("gate", False), ("head", True)])
def test_layers_are_chosen_by_role(role, has):
    assert (dense(role=role, targets="matrix, head").lora_a is not None) == has


def test_a_role_that_no_dense_layer_has_is_refused():
    with pytest.raises(ValueError, match=r"lora.targets='matrix,q_proj' .* 'q_proj' is none; use matrix, head, gate, router"):
        LoRAConfig(targets="matrix,q_proj")

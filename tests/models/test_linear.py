"""The projection and sigmaReparam, against singular values from LAPACK."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.layers.linear import Dense, SpectralVector, dense_layers, leading_vectors, power_iterate, power_step
from plait.models.lm import LM, fold
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import build, layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import hybrid

IN, OUT = 48, 32
ONE_PERCENT = 0.01  # what the method promises of the power iteration (methods: 20 steps), not a rounding tolerance
KINDS = ("spectral", "one")


def dense(sigma_reparam: str | None, **options) -> Dense:
    ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(3), seq_len=8, sigma_reparam=sigma_reparam)
    return Dense(ctx, IN, OUT, ("embed", "mlp"), **options)


def top_singular_value(w: jax.Array) -> float:
    return float(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[0])


def input_of(key: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(key), (5, IN))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_the_kernel_over_its_top_singular_value_times_the_gain(kind):
    layer = dense(kind)
    for _ in range(300):  # to convergence: what remains is rounding
        layer.power_iterate()
    layer.gain[...] = jnp.float32(1.7)
    kernel = np.asarray(layer.kernel[...], np.float64)
    assert_close(layer.weight(), 1.7 * kernel / np.linalg.svd(kernel, compute_uv=False)[0])
    assert_close(layer(input_of()), np.asarray(input_of(), np.float64) @ np.asarray(layer.weight(), np.float64))


def test_gain_starts_where_the_kind_says():
    spectral, one, plain = dense("spectral"), dense("one"), dense(None)
    assert_close(spectral.weight(), plain.kernel[...])
    assert_close(spectral.gain[...], np.float32(top_singular_value(plain.kernel[...])))
    assert one.gain[...] == 1.0
    assert_close(np.float32(top_singular_value(one.weight())), np.float32(1))


SHAPES = [(1, 9), (5, 7), (64, 64), (256, 64), (64, 1000), (300, 301), (2, 3, 96, 97)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e15])
def test_new_vectors_are_those_of_the_exact_decomposition(shape, scale):
    kernel = scale * jax.random.truncated_normal(jax.random.key(1), -2, 2, shape)
    v, u = leading_vectors(kernel)
    left, sizes, right = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    sigma = np.einsum("...i,...io,...o->...", *(np.asarray(a, np.float64) for a in (v, kernel, u)))
    assert_close(sigma.astype(np.float32), sizes[..., 0].astype(np.float32))
    assert np.min(np.abs(np.sum(np.asarray(v) * left[..., :, 0], -1))) > 1 - 1e-3
    assert np.min(np.abs(np.sum(np.asarray(u) * right[..., 0, :], -1))) > 1 - 1e-3


@pytest.mark.parametrize(
    "kernel", [np.ones((4, 6)), np.eye(8), np.outer(np.arange(5.0), np.arange(3.0)), np.diag([3.0, 3.0, 1.0])]
)
def test_new_vectors_of_kernels_that_are_not_random(kernel):
    v, u = leading_vectors(jnp.asarray(kernel, jnp.float32))
    assert_close(v @ kernel @ u, np.float32(np.linalg.norm(kernel, 2)))


def test_kernel_of_zeros_has_finite_vectors():
    assert all(np.isfinite(a).all() for a in leading_vectors(jnp.zeros((4, 6))))


def test_layers_of_a_model_start_as_layers_by_themselves():
    model = hybrid({"model.sigma_reparam": "spectral", "model.vocab_size": 40, "model.num_layers": 4}).model
    layers = dense_layers(LM(model, rngs=nnx.Rngs(0), seq_len=8))
    assert any(layer.kernel.ndim == 3 for _, layer in layers) and any(layer.kernel.ndim == 2 for _, layer in layers)
    for path, layer in layers:
        v, u = leading_vectors(layer.kernel[...])
        assert_close(layer.v[...], v, err_msg=str(path))
        assert_close(layer.u[...], u, err_msg=str(path))
        sizes = np.linalg.norm(np.asarray(layer.kernel[...], np.float64), 2, axis=(-2, -1))
        assert_close(layer.gain[...], sizes.astype(np.float32), err_msg=str(path))


@pytest.mark.parametrize("gain", [0.5, -2.0])
def test_spectral_norm_is_the_gain_within_a_percent_after_20_power_steps(gain):
    layer = dense("one")
    layer.kernel[...] = jax.random.normal(jax.random.key(9), (IN, OUT))  # a new kernel: the vectors know nothing of it
    layer.gain[...] = jnp.float32(gain)
    for _ in range(20):
        layer.power_iterate()
    assert top_singular_value(layer.weight()) == pytest.approx(abs(gain), rel=ONE_PERCENT)


def test_spectral_norm_stays_at_the_gain_while_training():
    layer = dense("one")
    x, target = input_of(), 30.0 * jax.random.normal(jax.random.key(5), (5, OUT))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, rest, opt):
        layer = nnx.merge(graph, params, rest)
        layer.power_iterate()
        rest = nnx.split(layer, nnx.Param, ...)[2]
        grads = jax.grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p, rest)(x) - target)))(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), rest, opt, nnx.merge(graph, params, rest).weight()

    opt, norms, excess = tx.init(params), [], []
    for _ in range(120):
        gain = abs(float(params["gain"][...]))
        norms.append(top_singular_value(params["kernel"][...]))
        params, rest, opt, weight = step(params, rest, opt)
        excess.append(top_singular_value(weight) / gain)
    assert norms[-1] > 3 * norms[0]  # the kernel itself grows without bound
    assert min(excess) > 1 - ONE_PERCENT  # v^T W u never exceeds the norm
    assert max(excess) < 1.5  # one power step per optimizer step lags only while a new direction overtakes the leading one
    layer = nnx.merge(graph, params, rest)
    for _ in range(20):
        layer.power_iterate()
    assert top_singular_value(layer.weight()) == pytest.approx(abs(float(layer.gain[...])), rel=ONE_PERCENT)


def test_gradient_is_orthogonal_to_the_kernel():
    layer = dense("spectral")
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p, rest)(input_of()))))(params)
    g, w = grads["kernel"][...], params["kernel"][...]
    assert float(jnp.linalg.norm(g)) > 0
    assert_close(jnp.sum(g * w) / (jnp.linalg.norm(g) * jnp.linalg.norm(w)), np.float32(0))


def test_gradient_is_that_of_the_formula_with_fixed_vectors():
    layer = dense("spectral", use_bias=True)
    u, v, gain = (np.asarray(a[...]) for a in (layer.u, layer.v, layer.gain))

    def formula(kernel):
        return jnp.sum(jnp.sin(input_of() @ (gain / (v @ kernel @ u) * kernel)))

    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p, rest)(input_of()))))(params)
    assert_close(grads["kernel"][...], jax.grad(formula)(layer.kernel[...]))


def test_forward_only_reads():
    layer = dense("spectral")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    layer(input_of())
    layer.weight()
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), before)


def test_power_step_of_a_stack_is_the_power_step_of_each_matrix():
    kernels = jax.random.normal(jax.random.key(1), (3, IN, OUT))
    u = jax.random.normal(jax.random.key(2), (3, OUT))
    v, moved = power_step(kernels, u)
    for i in range(3):
        vi, ui = power_step(kernels[i], u[i])
        assert_close(v[i], vi)
        assert_close(moved[i], ui)
    assert_close(jnp.linalg.norm(moved, axis=-1), np.ones(3))


def test_power_iterate_without_sigma_reparam_does_nothing():
    layer = dense(None)
    before = np.asarray(layer.kernel[...])
    layer.power_iterate()
    np.testing.assert_array_equal(layer.kernel[...], before)
    assert not jax.tree.leaves(nnx.state(layer, SpectralVector))


@pytest.fixture(scope="module")
def model() -> LM:
    """Two layers stacked and a head, each projection sigma-reparametrised."""
    config = LMConfig(
        d_model=32,
        num_layers=2,
        pattern="moh+softmax",
        mixers={"moh+softmax": MoHConfig(mixer=SoftmaxConfig(head_dim=8), num_shared_heads=2)},
        channel_mixer=GatedMLPConfig(hidden_dim=48),
        vocab_size=64,
        sigma_reparam="one",
    )
    return build(config, seq_len=16)


def test_power_iterate_moves_the_vectors_of_every_layer_of_the_stack(model):
    layers = dense_layers(model)
    assert {layer.kernel[...].ndim for _, layer in layers} == {2, 3}  # the head and the stacked layers
    for _, layer in layers:
        layer.kernel[...] = layer.kernel[...] + jax.random.normal(jax.random.key(4), layer.kernel[...].shape)
    before = [np.asarray(layer.u[...]) for _, layer in layers]
    power_iterate(model)
    for (path, layer), u in zip(layers, before, strict=True):
        assert (np.abs(layer.u[...] - u).max(-1) > 0).all(), path
        expected_v, expected_u = power_step(layer.kernel[...], u)
        assert_close(layer.v[...], expected_v, err_msg=str(path))
        assert_close(layer.u[...], expected_u, err_msg=str(path))


def test_fold_gives_a_plain_model_with_the_same_logits(model):
    plain = fold(model)
    assert plain.config.sigma_reparam is None
    assert not jax.tree.leaves(nnx.state(plain, SpectralVector))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert not any(path[-1] in ("gain", "u", "v") for path in paths)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    at = dataclasses.replace(layout((9, 5), (16,), length=16), ids=tokens)
    call = lambda m: quick_jit(lambda state: nnx.merge(nnx.split(m)[0], state)(at)[0])(nnx.split(m)[1])
    assert_close(call(plain), call(model))


def test_fold_of_a_plain_model_is_the_model():
    config = LMConfig(d_model=32, num_layers=1, pattern="gla", vocab_size=64)
    plain = LM(config, rngs=nnx.Rngs(0), seq_len=16)
    assert fold(plain) is plain

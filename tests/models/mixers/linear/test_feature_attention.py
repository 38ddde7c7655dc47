"""Linear attention by features against fla and the authors' code, and what its papers say of it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS
from plait.models.mixers.linear import feature_maps
from plait.models.mixers.linear.base_conv import BaseConvConfig
from plait.models.mixers.linear.based import BasedConfig
from plait.models.mixers.linear.feature_attention import seen
from plait.models.mixers.linear.hedgehog import HedgehogConfig
from plait.models.mixers.linear.linear import LinearConfig
from plait.models.mixers.linear.lolcats import LoLCATsConfig
from plait.models.mixers.linear.sums import Sums
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_maps
from plait.tests.models.golden.generate_maps import HEADS, WIDTH, Arrays
from plait.tests.models.mixers.linear.oracle import HEAD_DIM, assert_agrees, dense, read
from plait.tests.tolerances import assert_close, in_float64

PROJECTIONS = {name: f"{name}_proj" for name in "qkvo"}


def per_head(arrays: Arrays, ours: str, theirs: str) -> Arrays:
    """A map that all heads share there, once for each."""
    return {name: np.stack([value] * HEADS) for name, value in dense(arrays, **{ours: theirs}).items()}


def linear(arrays: Arrays, name: str) -> None:
    weights, map_name = dense(arrays, **PROJECTIONS), name.removeprefix("linear_")
    inner = {"relu": {"first": "layer"}, "hadamard": {"first": "layer1", "second": "layer2"}}.get(map_name, {})
    for side in "qk":
        for ours, theirs in inner.items():
            weights |= per_head(arrays, f"{side}_map.{ours}", f"feature_map_{side}.{theirs}")
        if map_name == "rebased":
            for ours, theirs in (("scale", "gamma"), ("bias", "beta")):
                weights[f"{side}_map.norm.{ours}"] = arrays[f"weights/feature_map_{side}.{theirs}"]
    normalizer = "rms_norm" if map_name == "hadamard" else "denominator"
    if normalizer == "rms_norm":
        weights["norm.scale"] = arrays["weights/norm.weight"]
    assert_agrees(LinearConfig(num_heads=HEADS, feature_map=map_name, normalizer=normalizer), weights, arrays)


def hedgehog(arrays: Arrays) -> None:
    weights = dense(arrays, **PROJECTIONS)
    for side in "qk":
        weights |= per_head(arrays, f"{side}_map.w", f"feature_map_{side}.layer")
    assert_agrees(HedgehogConfig(num_heads=HEADS, head_dim=HEAD_DIM, softmax="joint", rope_theta=None), weights, arrays)


@pytest.mark.proves("linear", "hedgehog")
@pytest.mark.parametrize("name", [name for name in generate_maps.FLA if name != "parallax"])
def test_fla(name):
    hedgehog(read(name)) if name == "hedgehog_joint" else linear(read(name), name)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("fla") is None, reason="needs torch and fla"
)
@pytest.mark.parametrize("name", [name for name in generate_maps.FLA if name != "parallax"])
def test_fla_live(name):
    arrays = generate_maps.FLA[name](seed=3)
    hedgehog(arrays) if name == "hedgehog_joint" else linear(arrays, name)


@pytest.mark.proves("based")
@pytest.mark.parametrize("packing", ["symmetric", "outer"])
def test_based_is_the_authors_with_either_packing(packing):
    arrays = read("based")
    weights = dense(arrays, q="proj_q", k="proj_k", v="proj_v", o="out_proj")
    assert_agrees(BasedConfig(num_heads=HEADS, feature_dim=4, packing=packing), weights, arrays)


@pytest.mark.proves("lolcats")
def test_lolcats_is_the_authors():
    arrays = read("lolcats")
    weights = dense(arrays, **PROJECTIONS) | {"window_factor": arrays["weights/window_factors"].reshape(HEADS)}
    weights |= {f"{side}_map.w.kernel": arrays[f"weights/feature_map_{side}.mlp.layer"] for side in "qk"}
    config = LoLCATsConfig(num_heads=HEADS, num_kv_heads=1, head_dim=HEAD_DIM, window_size=5, feature_dim=4, positions=None)
    assert_agrees(config, weights, arrays)


@pytest.mark.proves("base_conv")
def test_base_conv_is_the_authors():
    arrays = read("base_conv")
    weights = dense(arrays, both="in_proj", o="out_proj")
    kernel, bias = weights.pop("both.kernel"), weights.pop("both.bias")
    for name, half in (("value", slice(None, 2 * WIDTH)), ("gate", slice(2 * WIDTH, None))):
        weights |= {f"{name}.kernel": kernel[:, half], f"{name}.bias": bias[half]}
    weights["conv.weight"] = arrays["weights/conv.conv.weight"][:, 0].T
    assert_agrees(BaseConvConfig(), weights, arrays)


def test_taylor_features_multiply_to_the_polynomial_in_both_packings():
    q, k = np.random.default_rng(0).normal(size=(2, 50, 16))
    s = (q * k).sum(-1) / 4
    for symmetric, size in ((True, 153), (False, 273)):
        f, g = (in_float64(quick_jit(lambda x, s=symmetric: feature_maps.taylor(x, symmetric=s)), x) for x in (q, k))
        assert f.shape[-1] == size
        np.testing.assert_allclose((f * g).sum(-1), 1 + s + s**2 / 2, rtol=1e-6)


def module(config, **options):
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=8, **options))


def rows_of(config, x, *, causal=True):
    """Implied attention `[B, H, T, T]` of a new layer, and the layer."""
    mixer = module(config, causal=causal)
    return quick_jit(lambda x: mixer.implied_attention(x, at=Tokens()))(jnp.asarray(x)), mixer


def test_based_scales_queries_once_and_in_every_form():
    """fla's layer scales them in its chunk mode and not in its parallel one."""
    x = np.random.default_rng(1).normal(size=(1, 6, WIDTH)).astype(np.float32)
    a, mixer = rows_of(BasedConfig(num_heads=2, feature_dim=4), x)
    q, k = (np.asarray(dense(x[0])).reshape(6, 2, 4) for dense in (mixer.q, mixer.k))
    s = np.einsum("thk,shk->hts", q, k) / 4**0.5
    weights = np.tril(1 + s + s**2 / 2)
    assert_close(a[0], weights / weights.sum(-1, keepdims=True))


def test_based_features_and_sums_are_float32_where_the_layer_is_bfloat16():
    mixer = module(BasedConfig(num_heads=2, feature_dim=4), compute_dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, WIDTH)) * 20, jnp.bfloat16)
    inputs, state = mixer.project(x, at=Tokens().placed(1, 6), state=mixer.init_state(1, 8))
    assert {inputs.q.dtype, inputs.k.dtype, state.sums["memory"].dtype} == {jnp.dtype("float32")}
    q = mixer.heads(mixer.q(x)).astype(jnp.float32)
    np.testing.assert_array_equal(inputs.q, feature_maps.taylor(q))


def test_hedgehog_has_a_map_a_head_for_queries_and_one_for_keys_that_start_at_the_identity():
    mixer = module(HedgehogConfig(num_heads=2, head_dim=8))
    for side in (mixer.q_map, mixer.k_map):
        np.testing.assert_array_equal(side.w.kernel[...], np.stack([np.eye(8)] * 2))


@pytest.mark.proves("hedgehog")
def test_hedgehog_normalises_each_sign_alone_and_after_the_rotation():
    x = np.random.default_rng(3).normal(size=(1, 3, WIDTH)).astype(np.float32)
    a, mixer = rows_of(HedgehogConfig(num_heads=1, head_dim=2, rope_theta=100.0), x)
    turned = {}
    for side in "qk":
        y = np.asarray(getattr(mixer, side)(jnp.asarray(x)), np.float64)[0]
        turn = np.arange(3)[:, None] * 1.0  # the one frequency of two channels
        y = np.concatenate(
            [y[:, :1] * np.cos(turn) - y[:, 1:] * np.sin(turn), y[:, 1:] * np.cos(turn) + y[:, :1] * np.sin(turn)], 1
        )
        both = [np.exp(s * y) / np.exp(s * y).sum(-1, keepdims=True) for s in (1, -1)]
        turned[side] = np.concatenate(both, axis=-1)
    weights = np.tril(turned["q"] @ turned["k"].T)
    assert_close(a[0, 0], weights / weights.sum(-1, keepdims=True))
    joint, _ = rows_of(HedgehogConfig(num_heads=1, head_dim=2, rope_theta=100.0, softmax="joint"), x)
    assert np.abs(joint - a).max() > 1e-3


def test_linear_attention_of_three_tokens_by_hand():
    x = np.random.default_rng(4).normal(size=(1, 3, WIDTH)).astype(np.float32)
    a, mixer = rows_of(LinearConfig(num_heads=1), x)
    f = lambda y: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0)))
    q, k = (f(np.asarray(dense(jnp.asarray(x)), np.float64)[0]) for dense in (mixer.q, mixer.k))
    expected = np.zeros((3, 3))
    for i in range(3):
        for j in range(i + 1):
            expected[i, j] = q[i] @ k[j] / sum(q[i] @ k[other] for other in range(i + 1))
    assert_close(a[0, 0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_sums_over_tokens_are_those_of_the_mask(causal):
    """The recurrence and the parallel form in float64."""
    at = layout((7, 5), (9,), length=13)
    q, k, v = np.random.default_rng(5).normal(size=(3, 2, 13, 2, 4))
    visible = np.asarray(seen(at, jnp.arange(13), causal))

    @quick_jit
    def run(q, k, v):
        sums = Sums(at, causal=causal)
        return sums.read("memory", q, k, v), sums.total("values", v), sums.mass("keys", q, k), sums.count

    read, total, mass, count = in_float64(run, q, k, v)
    scores = np.where(visible, np.einsum("bthk,bshk->bhts", q, k), 0)
    real = np.asarray(at.segment_ids) > 0
    for got, want in (
        (read, np.einsum("bhts,bshv->bthv", scores, v)),
        (total, np.einsum("bhts,bshv->bthv", np.broadcast_to(visible, scores.shape), v)),
        (mass[..., 0], np.moveaxis(scores.sum(-1), 1, 2)),
        (np.broadcast_to(count, mass.shape)[..., 0], np.broadcast_to(np.moveaxis(visible.sum(-1), 1, 2), mass.shape[:3])),
    ):
        np.testing.assert_allclose(got[real], want[real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"feature_map": "hadamard"}, "feature_map='hadamard' gives weights of both signs.*use normalizer='rms_norm'"),
        ("hedgehog", {"head_dim": 7}, "head_dim=7 must be even.*use 8"),
        ("based", {"feature_dim": 0}, "feature_dim=0 must be a whole number from 1"),
    ],
)
def test_options_outside_a_domain_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](**options)


@pytest.mark.parametrize("name", ["linear", "based"])
def test_heads_that_do_not_divide_the_width_are_refused(name):
    with pytest.raises(ValueError, match=r"num_heads=3 must divide .*use one of"):
        MIXERS[name](num_heads=3).fit(64)


def test_decoding_a_layer_that_sees_all_of_a_document_is_refused():
    mixer = module(LinearConfig(num_heads=2), causal=False)
    with pytest.raises(NotImplementedError, match="it cannot take it token by token"):
        mixer.step(jnp.zeros((1, 1, WIDTH)), mixer.init_state(1, 8), at=Tokens(positions=jnp.zeros((1, 1), jnp.int32)), carry={})


def test_no_gradient_is_lost_where_a_relu_map_is_zero():
    """All features of a query may be 0, and its denominator with them."""
    mixer = module(LinearConfig(num_heads=2, feature_map="relu"))

    @quick_jit
    def run(x):
        y, pull = jax.vjp(lambda x: mixer(x, at=Tokens(), carry={}).y, x)
        return y, *pull(jnp.ones_like(y))

    assert all(np.isfinite(found).all() for found in run(jnp.zeros((1, 4, WIDTH))))

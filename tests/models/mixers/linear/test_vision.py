"""The linear attentions of vision backbones against the authors' code, and what their papers say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.linear.feature_attention import Weights
from plait.models.mixers.linear.flowformer import FlowformerConfig
from plait.models.mixers.linear.inline_attention import InLineConfig
from plait.models.mixers.linear.mala import MALA, MALAConfig
from plait.models.mixers.linear.nalaformer import NaLaFormerConfig
from plait.models.mixers.linear.rala import RALAConfig, document_maximum
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate_maps import HEADS, THETA, WIDTH, Arrays
from plait.tests.models.mixers.linear.oracle import HEAD_DIM, assert_agrees, dense, read
from plait.tests.models.mixers.traced_flops import count_flops
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, in_float64

HALVES = np.r_[0:HEAD_DIM:2, 1:HEAD_DIM:2]
ON_LINE = {"num_heads": HEADS, "head_dim": HEAD_DIM, "rope_theta": THETA}


def on_line(arrays: Arrays, fused: str, out: str, parts: str) -> Arrays:
    """The layers there fuse their projections and rotate neighbouring channels; an image of one column meets a kernel's middle one."""
    weights = dense(arrays, fused=fused, o=out)
    kernel, bias = weights.pop("fused.kernel"), weights.pop("fused.bias")
    turn = lambda y: y.reshape(*y.shape[:-1], HEADS, HEAD_DIM)[..., HALVES].reshape(y.shape)
    for i, name in enumerate(parts.split()):
        part = [y[..., i * WIDTH : (i + 1) * WIDTH] for y in (kernel, bias)]
        part = [turn(y) for y in part] if name in "qk" else part
        weights |= dict(zip((f"{name}.kernel", f"{name}.bias"), part, strict=True))
    weights["lepe.weight"] = arrays["weights/lepe.weight"][:, 0, :, 2].T
    weights["lepe.bias"] = arrays["weights/lepe.bias"]
    return weights


@pytest.mark.proves("mala", "rala")
@pytest.mark.parametrize("config", [MALAConfig(**ON_LINE), RALAConfig(**ON_LINE)], ids=lambda config: config.name)
def test_mala_and_rala_are_the_authors(config):
    arrays = read(config.name)
    assert_agrees(config, on_line(arrays, "qkvo", "proj", "q k v gate"), arrays, causal=False)


@pytest.mark.proves("nalaformer")
def test_nalaformer_is_the_authors():
    arrays = read("nalaformer")
    weights = on_line(arrays, "qkvg", "out_proj", "q k v gate")
    weights |= {"norm.scale": arrays["weights/ln.weight"], "norm.bias": arrays["weights/ln.bias"]}
    assert_agrees(NaLaFormerConfig(**ON_LINE), weights, arrays, causal=False)


@pytest.mark.proves("inline_attention")
def test_inline_attention_is_the_authors_but_for_the_residual():
    arrays = read("inline_attention")
    weights = dense(arrays, fused="qkv", o="proj")
    for name, part in zip("qkv", np.split(weights.pop("fused.kernel"), 3, axis=1), strict=True):
        weights[f"{name}.kernel"] = part
    assert_agrees(InLineConfig(num_heads=HEADS, local_size=None), weights, arrays, causal=False)


@pytest.mark.proves("flowformer")
@pytest.mark.parametrize(("name", "causal"), [("flowformer", False), ("flowformer_causal", True)])
def test_flowformer_is_the_authors(name, causal):
    arrays = read(name)
    weights = dense(arrays, q="query_projection", k="key_projection", v="value_projection", o="out_projection")
    assert_agrees(FlowformerConfig(num_heads=HEADS), weights, arrays, causal=causal)


def new(config, *, causal: bool):
    """A layer whose parameters are moved off their initial values."""
    graph, state = nnx.split(made(config, causal=causal))
    rng = np.random.default_rng(1)
    move = lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.normal(size=a.shape).astype(a.dtype))
    return nnx.merge(graph, jax.tree.map(move, state))


def made(config, **options):
    """A new layer, its parameters made in one compiled function."""
    create = lambda: config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=9, **options))
    return nnx.merge(nnx.split(nnx.eval_shape(create))[0], quick_jit(lambda: nnx.split(create())[1])())


X = np.random.default_rng(0).normal(size=(1, 9, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("causal", usually([True, False], False))
@pytest.mark.parametrize(
    "config",
    [MALAConfig(num_heads=HEADS, head_dim=HEAD_DIM, rope_theta=None), InLineConfig(num_heads=HEADS)],
    ids=lambda config: config.name,
)
def test_rows_of_mala_and_inline_attention_sum_to_1_and_may_be_negative(config, causal):
    mixer = new(config, causal=causal)
    a = quick_jit(lambda x: mixer.implied_attention(x, at=Tokens()))(jnp.asarray(3 * X))
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-4)
    assert (np.asarray(a) < 0).any()


def test_mala_normalises_by_features_that_are_not_rotated(monkeypatch):
    """So rows do not sum to 1 under rotation, and its shift is that of no rotation at all."""
    turned, still = (
        new(MALAConfig(num_heads=HEADS, head_dim=HEAD_DIM, rope_theta=theta), causal=True) for theta in (THETA, None)
    )
    found = []
    monkeypatch.setattr(MALA, "read", lambda self, weights, v, sums: found.append(weights) or v)
    for mixer in (turned, still):
        mixer(jnp.asarray(X), at=Tokens(), carry={})
    one, other = found
    assert isinstance(one, Weights)
    assert_close(one.shift, other.shift)
    assert np.abs(one.q - other.q).max() > 1e-2


def test_nalaformer_features_are_powers_in_float32_without_a_gradient_that_is_not_a_number():
    mixer = made(NaLaFormerConfig(num_heads=HEADS, head_dim=HEAD_DIM), compute_dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16).at[:, 2].set(0)  # a query of length 0
    at = Tokens().placed(1, 9)

    @quick_jit
    def run(x):
        y, pull = jax.vjp(lambda x: mixer(x, at=at, carry={}).y, x)
        inputs, _ = mixer.project(x, at=at, state=None)
        return inputs, mixer.heads(mixer.q(x)).astype(jnp.float32), pull(jnp.ones_like(y))[0].astype(jnp.float32)

    inputs, q, gradient = run(x)
    assert inputs.q.dtype == inputs.k.dtype == jnp.float32
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    power = 3 * (0.5 + np.tanh(length))
    signs = [(np.maximum(s * q, 0) / np.maximum(length, 1e-12)) ** power for s in (1, -1)]
    assert_close(inputs.q, np.concatenate(signs, axis=-1), dtype="float32")
    assert np.isfinite(gradient).all()


def test_rala_weighs_keys_by_a_softmax_inside_each_document():
    at = layout((5, 4), length=9)
    x = np.array([1.0, 5, 2, 3, 0, 9, 4, 8, 7])
    largest = quick_jit(lambda x: document_maximum(x, at))(jnp.asarray(x)[None, :, None, None])
    np.testing.assert_array_equal(largest[0, :, 0, 0], [5] * 5 + [9] * 4)


def test_operations_of_rala_are_those_of_the_traced_pass(monkeypatch):
    """Which the contract counts of causal layers."""
    config = RALAConfig(num_heads=HEADS, head_dim=HEAD_DIM)
    mixer, at = new(config, causal=False), layout((9,), length=9)
    counted = count_flops(monkeypatch, lambda x: mixer(x, at=at, carry={}).y, jnp.asarray(X))
    assert config.flops(WIDTH, 9) == pytest.approx(counted / 9, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_local_residual_of_inline_attention_by_hand(causal):
    mixer = new(InLineConfig(num_heads=HEADS), causal=causal)
    x = jnp.asarray(X)

    @quick_jit
    def run(x):
        v = mixer.heads(mixer.v(x))
        return v, mixer.local(x, v, at=Tokens().placed(1, 9), state=None)[0]

    v, local = run(x)
    expected = np.zeros((9, HEADS, HEAD_DIM))
    for t in range(9):
        mean = (X[0, : t + 1] if causal else X[0]).mean(0).reshape(HEADS, HEAD_DIM)
        for h in range(HEADS):
            up, down = (
                (np.asarray(d.kernel[...][h], np.float64), np.asarray(d.bias[...][h])) for d in (mixer.local_up, mixer.local_down)
            )
            inner = np.asarray(jax.nn.gelu(jnp.asarray(mean[h] @ up[0] + up[1]), approximate=False), np.float64)
            weights = (inner @ down[0] + down[1]).reshape(HEAD_DIM, 3)
            for w in range(3):
                near = t - 2 + w if causal else t - 1 + w
                if 0 <= near < 9:
                    expected[t, h] += weights[:, w] * np.asarray(v[0, near, h])
    assert_close(local[0], expected)


def test_causal_means_end_at_the_token_and_count_it():
    """MALA of the first three tokens, by hand."""
    mixer = new(MALAConfig(num_heads=1, head_dim=HEAD_DIM, rope_theta=None), causal=True)
    a = np.asarray(quick_jit(lambda x: mixer.implied_attention(x, at=Tokens()))(jnp.asarray(X)))[0, 0]
    f = lambda y: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0)))
    q, k = (f(np.asarray(d(jnp.asarray(X)), np.float64)[0]) for d in (mixer.q, mixer.k))
    for i in range(3):
        n, scale = i + 1, HEAD_DIM**-0.5
        z = scale * q[i] @ k[:n].mean(0)
        assert_close(a[i, :n], (1 + 1 / (z + 1e-6)) * scale / n * (k[:n] @ q[i]) - z / n)
        np.testing.assert_array_equal(a[i, n:], 0)


@pytest.mark.parametrize("config", [MALAConfig, NaLaFormerConfig], ids=lambda config: config.name)
def test_a_convolution_without_a_middle_is_refused(config):
    with pytest.raises(ValueError, match="lepe_size=4 must be odd, to have a middle; use 5"):
        config(lepe_size=4)


def test_a_local_residual_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="local_size=2 must be odd, to have a middle; use 3"):
        InLineConfig(local_size=2)


def test_flowformer_cuts_conserved_sources_to_1():
    """Otherwise the exponential of a source that nothing flows to would overflow."""
    mixer = new(FlowformerConfig(num_heads=HEADS), causal=False)
    o = in_float64(quick_jit(lambda x: mixer(x, at=Tokens(), carry={}).y), 1e3 * X)
    assert np.isfinite(o).all()

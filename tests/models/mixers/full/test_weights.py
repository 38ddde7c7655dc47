"""Attention whose weights are not softmax's: formulas in float64, cases by hand, and the traps of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.components import at as at_path
from plait.kernels import Mask, weighted_rows
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.cog import CogConfig, SignedSoftmax
from plait.models.mixers.full.complexformer import ComplexFormerConfig
from plait.models.mixers.full.efficient import EfficientConfig
from plait.models.mixers.full.lssa import LSSAConfig, ScaledSoftplus
from plait.models.mixers.full.mta import Kernels, MTAConfig, MultiToken
from plait.models.mixers.full.neural_attention import NeuralAttentionConfig
from plait.models.mixers.full.optimised import OptimisedConfig
from plait.models.mixers.full.relu_attention import ReluAttentionConfig, ReluOverLength
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.full.super_attention import SuperAttentionConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.rotary import RotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, HEADS, HEAD_DIM, THETA = 32, 14, 4, 8, 10_000.0
AT = layout((LENGTH,), (8, 5), length=LENGTH)
HEADED = {"num_heads": HEADS, "head_dim": HEAD_DIM}
CAUSAL = Mask(causal=True)


def build(config: MixerConfig, *, move: bool = True, causal: bool = True) -> nnx.Module:
    """The layer, every parameter moved off its initial value, or at it."""
    layer = config.build(WIDTH, BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal))
    for i, variable in enumerate(jax.tree.leaves(nnx.state(layer), is_leaf=lambda v: isinstance(v, nnx.Variable))):
        if move:
            variable[...] = variable[...] + 0.3 * jax.random.normal(jax.random.key(i), variable.shape)
    return layer


def run(layer: nnx.Module, x: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(layer)
    return quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).y)(state, jnp.asarray(x, jnp.float32))


def inputs(seed: int = 1) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), (2, LENGTH, WIDTH)), np.float64)


# Formulas in float64: the weights [H, n, n] of one document, from its input h [n, D]


def w(dense: nnx.Module) -> np.ndarray:
    return np.asarray(dense.kernel[...], np.float64)


def heads(h: np.ndarray, dense: nnx.Module) -> np.ndarray:
    return (h @ w(dense)).reshape(len(h), -1, HEAD_DIM)


def turned(z: np.ndarray, slope: np.ndarray | float = 1.0, offset: np.ndarray | float = 0.0) -> np.ndarray:
    """Complex numbers `[n, H, K / 2]`, their angles adapted and then rotated by position."""
    half = z.shape[-1] // 2
    c = z[..., :half] + 1j * z[..., half:]
    angle = np.arange(len(z))[:, None] * THETA ** (-np.arange(half) / half)
    return np.abs(c) * np.exp(1j * (slope * np.angle(c) + offset + angle[:, None]))


def logits(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """`[H, n, n]` of complex queries and keys."""
    return np.einsum("ihc,jhc->hij", q, k.conj()).real


def visible(n: int, causal: bool) -> np.ndarray:
    return np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)


def softmax(z: np.ndarray, seen: np.ndarray) -> np.ndarray:
    e = np.where(seen, np.exp(z - z.max(-1, keepdims=True)), 0)
    return e / e.sum(-1, keepdims=True)


def lssa(layer, h, seen):
    unit = lambda z: z / np.sqrt((z**2).sum(-1, keepdims=True))
    q, k = (turned(unit(heads(h, dense))) for dense in (layer.q, layer.k))
    count = seen.sum(-1)[:, None]
    a = np.where(seen, np.log1p(np.exp(np.log(HEAD_DIM) * np.log(count) * logits(q, k))), 0)
    a = a / (a.sum(-1, keepdims=True) + 1e-8)
    if layer.config.power is None:
        return a
    sharp = np.maximum(count * a - (count > 3), 0) ** layer.config.power
    return sharp / sharp.sum(-1, keepdims=True)


def relu_attention(layer, h, seen):
    p = logits(*(turned(heads(h, dense)) for dense in (layer.q, layer.k))) / np.sqrt(HEAD_DIM)
    return np.where(seen, np.maximum(p, 0), 0) / seen.sum(-1)[:, None]


def complexformer(layer, h, seen):
    """As the docstring has it, a pair at a time: the cosine of the adapted difference of angles."""
    slope, offset = (np.asarray(p[...], np.float64) for p in (layer.slope, layer.offset))
    half = HEAD_DIM // 2
    q, k = ((z[..., :half] + 1j * z[..., half:]) for z in (heads(h, dense) for dense in (layer.q, layer.k)))
    position = np.arange(len(h))[:, None] - np.arange(len(h))[None]
    difference = np.angle(q)[:, None] - np.angle(k)[None]  # [n, n, H, K / 2]
    theta = THETA ** (-np.arange(half) / half)
    cosine = np.cos(slope * difference + offset + position[:, :, None, None] * theta)
    z = np.einsum("ihc,jhc,ijhc->hij", np.abs(q), np.abs(k), cosine) / np.sqrt(HEAD_DIM)
    return softmax(z, seen)


def super_attention(layer, h, seen):
    q, k = (turned(z.reshape(len(h), 1, WIDTH)) for z in (h @ w(layer.q), h))
    kernel = np.where(seen, np.asarray(layer.kernel[...], np.float64)[: len(h), : len(h)], 0)
    return softmax(logits(q, k) / np.sqrt(WIDTH), seen) @ kernel


FORMULAS = {
    "lssa": (LSSAConfig(**HEADED), lssa),
    "lssar": (LSSAConfig(**HEADED, power=15), lssa),
    "relu_attention": (ReluAttentionConfig(**HEADED), relu_attention),
    "complexformer": (ComplexFormerConfig(**HEADED), complexformer),
    "super_attention": (SuperAttentionConfig(max_len=LENGTH), super_attention),
}


@pytest.mark.proves("lssa", "relu_attention", "complexformer", "super_attention")
@pytest.mark.parametrize(
    ("name", "causal"),
    [
        (name, causal)
        for name, (config, _) in FORMULAS.items()
        for causal in (True, False)
        if causal or len(config.directions) > 1
    ],
)
def test_formula(name, causal):
    config, formula = FORMULAS[name]
    layer, x, expected = build(config, causal=causal), inputs(), np.zeros((2, LENGTH, WIDTH))
    for row, at in ((0, slice(0, LENGTH)), (1, slice(0, 8)), (1, slice(8, 13))):
        h = x[row, at]
        v = h[:, None] if name == "super_attention" else heads(h, layer.v)
        o = np.einsum("hij,jhv->ihv", formula(layer, h, visible(len(h), causal)), v)
        expected[row, at] = o.reshape(len(h), -1) @ w(layer.o)
    assert_close(run(layer, x), expected)


# Three tokens by hand


def rows(rule, q: list, k: list, parameters=None) -> np.ndarray:
    """The weights `[H, T, T]` of queries and keys `[T, K]` each, one head."""
    q, k = (jnp.asarray(y, jnp.float32)[None, :, None] for y in (q, k))
    weigh = lambda q, k: weighted_rows(q, k, jnp.arange(q.shape[1]), rule=rule, parameters=parameters, mask=CAUSAL)
    return np.asarray(quick_jit(weigh)(q, k))[0]


def test_relu_of_three_tokens():
    a = rows(ReluOverLength(), [[1.0], [2.0], [-3.0]], [[1.0], [-1.0], [-2.0]])
    np.testing.assert_allclose(a[0], [[1, 0, 0], [1, 0, 0], [0, 1, 2]])


def test_cog_of_three_tokens():
    a = rows(SignedSoftmax(), [[1.0], [1.0], [1.0]], [[1.0], [-1.0], [np.log(2) - 1]])[0]
    np.testing.assert_allclose(a[0], [1, 0, 0])
    np.testing.assert_allclose(a[1], [0.5, -0.5, 0])
    e, half = np.e, np.e / 2  # exp |p| of the third row: e, e, e / 2
    np.testing.assert_allclose(a[2], np.array([e, -e, -half]) / (2 * e + half), rtol=1e-6)


def test_lssa_of_three_tokens():
    unit = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    a = rows(ScaledSoftplus(None), unit, unit)[0]
    soft = lambda z: np.log1p(np.exp(z))
    second, third = np.log(2) ** 2, np.log(2) * np.log(3)
    np.testing.assert_allclose(a[0], [1, 0, 0])
    np.testing.assert_allclose(a[1], np.array([soft(0), soft(second), 0]) / (soft(0) + soft(second)), rtol=1e-6)
    expected = np.array([soft(-third), soft(0), soft(third)])
    np.testing.assert_allclose(a[2], expected / expected.sum(), rtol=1e-6)


def test_mta_of_three_tokens():
    """Logits 1 on each visible pair, a kernel of 1 on the previous query and next key and 2 on the own pair."""
    theta = np.zeros((1, 2, 3), np.float32)
    theta[0, 0, 2], theta[0, 1, 1] = 1, 2
    a = rows(MultiToken(2), np.ones((3, 1)), np.ones((3, 1)), Kernels(jnp.asarray(theta), None))[0]
    second, third = np.exp([2.0, 2.0]), np.exp([3.0, 2.0, 2.0])  # S'_10 = 2 + S_01 = 2: the future is zero; S'_20 = 2 + S_11
    np.testing.assert_allclose(a[0], [1, 0, 0])
    np.testing.assert_allclose(a[1, :2], second / second.sum(), rtol=1e-6)
    np.testing.assert_allclose(a[2], third / third.sum(), rtol=1e-6)


# Traps


def random_qk(length: int, num_heads: int = 2, channels: int = 4) -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.normal(jax.random.key(5), (2, 1, length, num_heads, channels)))


@pytest.mark.proves("cog")
def test_cog_rows_have_absolute_sum_one_and_zero_queries_finite_gradients():
    q, k = random_qk(9)
    weights = lambda q: weighted_rows(q, k, jnp.arange(9), rule=SignedSoftmax(), mask=CAUSAL)
    a, gradient = quick_jit(lambda q: (weights(q), jax.grad(lambda q: weights(q).sum())(0 * q)))(q)
    assert (np.asarray(a) < 0).any()
    np.testing.assert_allclose(np.abs(a).sum(-1), 1, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("power", [None, 15])
def test_lssa_first_row_sees_itself_and_every_row_sums_to_one(power):
    q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in random_qk(40))
    a = quick_jit(lambda q, k: weighted_rows(q, k, jnp.arange(40), rule=ScaledSoftplus(power), mask=CAUSAL))(q, k)
    np.testing.assert_array_equal(a[:, :, 0, 0], 1)
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-6)


def test_lssar_does_not_zero_rows_where_no_key_stands_out():
    unit = jnp.ones((1, 40, 1, 4)) / 2
    weights = lambda k: weighted_rows(unit, k, jnp.arange(40), rule=ScaledSoftplus(15), mask=CAUSAL)
    a, gradient = quick_jit(lambda k: (weights(k), jax.grad(lambda k: (weights(k) ** 2).sum())(k)))(unit)
    np.testing.assert_allclose(a[0, 0], np.tri(40) / np.arange(1, 41)[:, None], rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_lssar_subtracts_nothing_in_the_first_three_rows():
    q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in random_qk(5, 1))
    weights = lambda q, k: [weighted_rows(q, k, jnp.arange(5), rule=ScaledSoftplus(p), mask=CAUSAL)[0, 0] for p in (None, 15)]
    plain, sharp = (np.asarray(a, np.float64) for a in quick_jit(weights)(q, k))
    for row, offset in enumerate((0, 0, 0, 1, 1)):
        expected = np.maximum((row + 1) * plain[row] - offset, 0) ** 15
        np.testing.assert_allclose(sharp[row], expected / expected.sum(), rtol=1e-4, atol=1e-7)


def test_lssar_power_does_not_overflow():
    """One key of 512 has all the weight: 512^15 is no float32."""
    q = jnp.zeros((1, 512, 1, 4)).at[..., 0].set(1)
    k = (-q).at[:, 7].multiply(-1)
    weights = lambda q, k: weighted_rows(q, k, jnp.array([511]), rule=ScaledSoftplus(15), mask=CAUSAL)[0, 0, 0]
    a = quick_jit(weights)(q, k)
    assert a[7] == 1
    assert np.isfinite(a).all()


def mta_rows(q: jax.Array, k: jax.Array, at=None) -> jax.Array:
    kernel = jax.random.normal(jax.random.key(6), (2, 3, 5))
    options = {"rule": MultiToken(3), "parameters": Kernels(kernel, None), "mask": CAUSAL, "at": at}
    return quick_jit(lambda q, k: weighted_rows(q, k, jnp.arange(q.shape[1]), **options))(q, k)


def test_mta_masks_before_and_after_its_convolution():
    """A key in the future changes no weight, though the kernel is centred on keys."""
    q, k = random_qk(9)
    changed = mta_rows(q, k.at[:, 5:].add(1.0))
    np.testing.assert_array_equal(mta_rows(q, k)[:, :, :5], changed[:, :, :5])
    assert not np.triu(np.asarray(changed), 1).any()


def test_mta_convolution_does_not_cross_documents():
    q, k = random_qk(9)
    packed = mta_rows(q, k, layout((4, 5), length=9))
    np.testing.assert_array_equal(
        packed, mta_rows(q.at[:, :4].add(1.0), k.at[:, :4].add(1.0), layout((4, 5), length=9)).at[:, :, :4].set(packed[:, :, :4])
    )
    alone = mta_rows(q[:, 4:], k[:, 4:])
    np.testing.assert_allclose(packed[:, :, 4:, 4:], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.proves("mta")
def test_mta_starts_as_softmax_attention():
    layer = build(MTAConfig(**HEADED, query_taps=3, key_taps=5, mixed_heads=2, norm=False, depth_scale=False), move=False)
    same = build(SoftmaxConfig(**HEADED, positions=RotaryConfig(theta=100_000.0)), move=False)
    for name in "qkvo":
        getattr(same, name).kernel[...] = getattr(layer, name).kernel[...]
    assert_close(run(layer, inputs()), run(same, inputs()))


@pytest.mark.proves("complexformer")
def test_complexformer_starts_as_softmax_attention():
    layer, same = build(ComplexFormerConfig(**HEADED), move=False), build(SoftmaxConfig(**HEADED), move=False)
    for name in "qkvo":
        getattr(same, name).kernel[...] = getattr(layer, name).kernel[...]
    assert_close(run(layer, inputs()), run(same, inputs()))


@pytest.mark.proves("optimised", "efficient", "super_attention")
@pytest.mark.parametrize(
    ("config", "num_heads"),
    [(OptimisedConfig(**HEADED), HEADS), (EfficientConfig(), 1), (SuperAttentionConfig(max_len=LENGTH), 1)],
    ids=["optimised", "efficient", "super_attention"],
)
def test_left_out_projections_are_identities_of_softmax_attention(config, num_heads):
    layer, x = build(config, move=False), inputs()
    same = build(SoftmaxConfig(num_heads=num_heads, head_dim=WIDTH // num_heads), move=False)
    for name in "qkvo":
        kept = getattr(layer, name, None)
        getattr(same, name).kernel[...] = jnp.eye(WIDTH) if kept is None else kept.kernel[...]
    assert_close(run(layer, x), run(same, x))


def test_parameters_are_those_the_paper_counts():
    whole = SoftmaxConfig(num_heads=4, head_dim=16).num_params(64)
    assert OptimisedConfig(head_dim=16).num_params(64) == whole * 3 // 4
    assert EfficientConfig().num_params(64) == whole // 2
    assert SuperAttentionConfig(max_len=48).num_params(64) == whole // 2 + 48**2
    products = lambda config: config.product_flops(64) / (2 * 64**2)
    assert [products(c) for c in (OptimisedConfig(head_dim=16), EfficientConfig(), SuperAttentionConfig(max_len=48))] == [3, 2, 2]


def test_efficient_keeps_one_cache():
    assert EfficientConfig().state_bytes(64, 100, "bfloat16") == 100 * (64 * 2 + 4)


# Bad input


def test_super_attention_refuses_sequences_that_its_kernel_has_no_rows_for():
    config = SuperAttentionConfig(max_len=LENGTH)
    layer = build(config)
    message = rf"max_len={LENGTH} must be at least .*{LENGTH + 1} tokens.*train with max_len={LENGTH + 1}"
    with pytest.raises(ValueError, match=message):
        layer(jnp.zeros((1, LENGTH + 1, WIDTH)), at=layout((LENGTH + 1,), length=LENGTH + 1), carry={})
    with pytest.raises(ValueError, match=message):
        layer.init_state(1, LENGTH + 1)
    with pytest.raises(ValueError, match=message):
        config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: MTAConfig(key_taps=4), "key_taps=4 must be odd .* use 5"),
        (lambda: MTAConfig(query_taps=None), "query_taps=None and key_taps=11 .* set both"),
        (lambda: MTAConfig(norm=False), "depth_scale=True .* norm=True or depth_scale=False"),
        (lambda: MTAConfig(num_heads=4, head_dim=16).fit(64), "mixed_heads=16 must divide num_heads=4; use one of 1, 2, 4"),
        (lambda: NeuralAttentionConfig(pair_dim=1), "pair_dim=1 must be at least 2"),
        (lambda: ComplexFormerConfig(positions=None, head_dim=5), "head_dim=5 must be even"),
        (lambda: CogConfig(head_dim=5), "positions.fraction=1.0 turns 5 channels"),
        (
            lambda: CogConfig(positions=ALiBiConfig()),
            "positions=alibi adds to the logits of a softmax, which the weights of cog are not",
        ),
        (lambda: OptimisedConfig(head_dim=24, num_heads=4).fit(64), "head_dim=24 times 4 heads must be d_model=64"),
        (lambda: EfficientConfig().fit(63), "positions.fraction=1.0 turns 63 channels"),
        (lambda: LSSAConfig(power=0), "power=0 must be a whole number from 1 to 64"),
    ],
)
def test_bad_options_are_refused_with_a_fix(options, message):
    with pytest.raises(ValueError, match=message):
        at_path("mixer", options)

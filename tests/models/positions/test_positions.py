"""Position encodings: each against its formula, and the traps that their sources set."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.codec import decode, encode
from plait.kernels import DistanceBias, Mask, Tokens, attention, attention_rows
from plait.kernels.target import target
from plait.models.build import BuildContext
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.alibi import ALiBiConfig, slopes
from plait.models.positions.base import POSITIONS, PositionConfig
from plait.models.positions.learned import LearnedConfig
from plait.models.positions.relative import RelativeConfig
from plait.models.positions.rope import turn
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_ntk import NTKRotaryConfig
from plait.models.positions.rotary_proportional import ProportionalRotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.models.positions.sinusoidal import SinusoidalConfig
from plait.tests.models.common import build, layout, quick_jit
from plait.tests.tolerances import assert_close


def context(seq_len: int = 8, *, causal: bool = True) -> BuildContext:
    return BuildContext(rngs=nnx.Rngs(0), seq_len=seq_len, causal=causal)


def at(*positions: int) -> Tokens:
    return Tokens(positions=jnp.asarray([positions], jnp.int32))


@pytest.mark.parametrize("name", POSITIONS.all())
def test_every_encoding_is_read_back_and_says_what_it_is(name):
    config = POSITIONS[name]()
    assert decode(PositionConfig, json.loads(json.dumps(encode(config)))) == config
    assert config.place in ("input", "heads", "logits")
    assert config.source.endswith(")")
    mixer = SoftmaxConfig(num_heads=4, head_dim=16, positions=config)
    assert decode(MixerConfig, json.loads(json.dumps(encode(mixer)))) == mixer


def test_rope_theta_of_an_older_run_folder_is_the_rotary_embedding_that_it_was():
    for schema, name in ((SoftmaxConfig, "softmax"), (MLAConfig, "mla")):
        old = lambda theta, name=name: decode(MixerConfig, {"mixer_name": name, "rope_theta": theta})
        assert old(5e5) == schema(positions=RotaryConfig(theta=5e5))
        assert old(None) == schema(positions=None)


def test_sinusoids_are_interleaved():
    x = SinusoidalConfig(theta=100.0).build(context(), 4, 1).add(jnp.zeros((1, 2, 4)), at(0, 3))
    np.testing.assert_allclose(x[0], [[0, 1, 0, 1], [np.sin(3), np.cos(3), np.sin(0.3), np.cos(0.3)]], atol=1e-6)


def test_products_of_rotated_heads_see_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    for config in (POSITIONS[name]() for name in POSITIONS.all() if POSITIONS[name].place == "heads"):
        module = config.build(context(), 8, 1)
        turned = quick_jit(lambda i, j, module=module: jnp.sum(module.turn(q, i) * module.turn(k, j)))
        product = lambda i, j, turned=turned: turned(at(i), at(j))
        assert_close(product(1005, 1002), product(8, 5), dtype="bfloat16")  # angles of a thousand positions in float32


def test_partial_rotary_leaves_the_last_channels_and_pairs_as_the_layout_says():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 1, 8)), jnp.float32)
    for interleaved, pairs in ((False, [(0, 2), (1, 3)]), (True, [(0, 1), (2, 3)])):
        y = RotaryConfig(theta=100.0, fraction=0.5, interleaved=interleaved).build(context(), 8, 1).turn(x, at(3))
        np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
        for (a, b), angle in zip(pairs, (3.0, 0.3)):
            z = (x[0, 0, 0, a] + 1j * x[0, 0, 0, b]) * np.exp(1j * angle)
            np.testing.assert_allclose([y[0, 0, 0, a], y[0, 0, 0, b]], [z.real, z.imag], atol=1e-6)


def test_proportional_rotary_turns_the_fastest_pairs_of_the_whole_head():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 1, 8)), jnp.float32)
    y = ProportionalRotaryConfig(theta=100.0, fraction=0.5).build(context(), 8, 1).turn(x, at(3))
    for a, angle in enumerate((3.0, 3 * 100**-0.25, 0.0, 0.0)):
        z = (x[0, 0, 0, a] + 1j * x[0, 0, 0, a + 4]) * np.exp(1j * angle)
        assert_close(y[0, 0, 0, a::4], np.float32([z.real, z.imag]))


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest():
    plain, longer = RotaryConfig().frequencies(16), NTKRotaryConfig(factor=8.0).frequencies(16)
    assert longer[0] == plain[0]
    np.testing.assert_allclose(longer[-1], plain[-1] / 8)


def test_yarn_by_parts_stretches_slow_pairs_and_keeps_fast_ones():
    plain, longer = RotaryConfig().frequencies(64), YarnRotaryConfig(factor=8.0, original_len=4096).frequencies(64)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(longer[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(longer[turns < 0.8], plain[turns < 0.8] / 8)
    assert YarnRotaryConfig(factor=8.0).magnitude == pytest.approx(0.1 * np.log(8) + 1)
    assert YarnRotaryConfig(factor=8.0, attention_factor=1.0).magnitude == 1


def test_mla_puts_the_square_of_yarns_factor_on_the_scale_and_turns_by_the_angles_alone():
    config = MLAConfig(
        num_heads=2, kv_rank=4, nope_head_dim=4, rope_head_dim=4, v_head_dim=4, positions=YarnRotaryConfig(factor=8.0)
    )
    layer = config.build(16, context())
    assert layer.scale == pytest.approx((0.1 * np.log(8) + 1) ** 2 / np.sqrt(8))
    x = jax.random.normal(jax.random.key(0), (1, 1, 16))
    assert_close(*quick_jit(lambda x: (layer.project(x, at=at(0), state=None)[0].k_rope, layer.k_rope(x)))(x))


def test_alibi_slopes_of_heads_that_are_no_power_of_two():
    np.testing.assert_allclose(slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [2, 3])
def test_folded_alibi_is_the_explicit_bias_far_from_the_start(heads, dtype):
    """m i and m j alone, in 16 bits, would be lost in their difference."""
    length, start, scale = 40, 32_000, 12**-0.5
    q = jnp.zeros((1, length, heads, 12), dtype)
    tokens = Tokens(None, jnp.ones((1, length), jnp.int32), start + jnp.arange(length)[None])
    bias = ALiBiConfig().build(context(), 12, heads).bias(tokens, tokens, scale=scale)
    options = {"mask": Mask(), "at": tokens, "scale": scale, "bias": bias}

    @quick_jit
    def run(q):
        _, stats = attention(q, q, q, return_stats=True, **options)
        return attention_rows(q, q, jnp.arange(length), **options), stats.max_logit

    rows, largest = run(q)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    z = np.where(distance >= 0, -slopes(heads)[:, None, None] * distance, -np.inf)
    want = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(rows[0], want, atol=4e-3)  # float32 numbers of the size of 16,000 are added
    np.testing.assert_allclose(largest, 0, atol=8e-3)


def test_bidirectional_alibi_falls_on_both_sides():
    bias = ALiBiConfig().build(context(causal=False), 8, 1).bias(at(0), at(0), scale=1.0)
    np.testing.assert_allclose(bias.at(jnp.arange(-3, 4))[0], -np.abs(np.arange(-3, 4)) / 256)


def test_relative_buckets_tell_the_sides_apart_and_widen():
    edges, order = RelativeConfig().buckets(causal=True)
    of = lambda d: np.asarray(order)[np.searchsorted(edges, d, side="right")]
    assert of(-5) == of(0) == 0
    assert of(np.arange(16)).tolist() == list(range(16))
    assert of(128) == of(10_000) == 31
    edges, order = RelativeConfig().buckets(causal=False)
    assert of(np.asarray([0, 3, -3, 500, -500])).tolist() == [0, 3, 19, 15, 31]


def test_learned_table_too_short_is_refused_in_training_and_in_decoding():
    with pytest.raises(ValueError, match=r"^positions\.max_len=4 must be at least the 8 tokens of training"):
        SoftmaxConfig(num_heads=2, head_dim=8, positions=LearnedConfig(max_len=4)).build(16, context(8))
    layer = SoftmaxConfig(num_heads=2, head_dim=8, positions=LearnedConfig(max_len=8)).build(16, context(8))
    with pytest.raises(ValueError, match=r"^positions\.max_len=8 must be at least the 9 tokens of decoding"):
        layer.init_state(1, 9)
    model = LMConfig(d_model=16, num_layers=1, pattern="gla", vocab_size=8, positions=LearnedConfig(max_len=8))
    with pytest.raises(ValueError, match=r"^model\.positions\.max_len=8 must be at least the 9 tokens of training"):
        nnx.eval_shape(lambda: LM(model, rngs=nnx.Rngs(0), seq_len=9))
    with pytest.raises(ValueError, match=r"^model\.positions\.max_len=8 must be at least the 9 tokens of decoding"):
        nnx.eval_shape(lambda: LM(model, rngs=nnx.Rngs(0), seq_len=8)).init_state(1, 9)


def test_positions_of_the_embedding_count_within_documents_and_decode_as_they_train():
    mixer = SoftmaxConfig(num_heads=2, head_dim=8, positions=None)
    config = LMConfig(
        d_model=16, num_layers=1, pattern="softmax", mixers={"softmax": mixer}, vocab_size=8, positions=LearnedConfig(max_len=8)
    )
    model = build(config, seq_len=8)
    model.positions.table[...] = jax.random.normal(jax.random.key(1), (8, 16))
    ids = jnp.asarray([[3, 1, 4, 1, 5, 2, 6, 5]])
    packed = layout((5, 3), length=8)

    @quick_jit
    def run(ids):
        whole = model(Tokens(ids, packed.segment_ids, packed.positions))[0]
        alone = model(Tokens(ids[:, :5], *(a[:, :5] for a in (packed.segment_ids, packed.positions))))[0]
        logits, state = model.prefill(Tokens(ids[:, :3], jnp.ones((1, 3), jnp.int32)), model.init_state(1, 8))
        stepped, _ = model.step(Tokens(ids[:, 3:4], None, jnp.asarray([[3]])), state)
        return whole, alone, model(Tokens(ids[:, 5:]))[0], logits, stepped

    whole, alone, second, logits, stepped = jax.tree.map(np.asarray, run(ids))
    assert_close(whole[:, :5], alone)
    assert_close(whole[:, 5:], second)
    assert np.abs(alone[:, 1] - alone[:, 3]).max() > 0.1  # one token in two places
    assert_close(logits, alone[:, 2])
    assert_close(stepped, alone[:, 3])


def test_a_bias_by_distance_is_that_of_a_table_and_slopes():
    bias = DistanceBias(jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([0.5]), (0, 4))
    assert bias.at(jnp.asarray([-2, 0, 3, 4])).tolist() == [[0.0, 2.0, 0.5, 1.0]]


def test_turning_by_no_angle_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
    for interleaved in (False, True):
        np.testing.assert_array_equal(turn(x, jnp.zeros((1, 2), int), [1.0, 0.5], interleaved=interleaved), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 12])
def test_turning_by_a_product_is_turning_by_halves(width: int, interleaved: bool, dtype: str):
    """As on TPU, forward and backward; the channels beyond the first eight stay."""
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal((2, 5, 3, width)), dtype) for _ in range(2))
    where = jnp.asarray(rng.integers(0, 1000, (2, 5)), jnp.int32)

    def both(x: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x: turn(x, where, [1.0, 0.5, 0.1, 0.01], interleaved=interleaved, factor=1.25), x)
        return y, *pull(d)

    plain = quick_jit(both)(x)
    with target("v5e"):
        found = quick_jit(both)(x)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, dtype=dtype)
    np.testing.assert_array_equal(found[0][..., 8:], x[..., 8:])

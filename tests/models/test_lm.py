"""The language model: scan, recomputation, decoding, options, first values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.models.mixers.base import MIXERS
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.moh import MoHConfig
from plait.tests.models.common import build, layout, left_padded, quick_jit
from plait.tests.tolerances import assert_close
from plait.TODO import PictureProbe, Stats

WIDTH, VOCAB, LENGTH = 32, 97, 24
PACKED = layout((9, 11), (LENGTH,), length=LENGTH)
REAL = np.asarray(PACKED["segment_ids"] > 0)
SOFTMAX, LINEAR = SoftmaxConfig(num_heads=2, head_dim=16), GatedDeltaNetConfig(num_heads=2, head_dim=8)


def lm(pattern: str, num_layers: int, **options) -> LMConfig:
    table = {"softmax": SOFTMAX, "gated_deltanet": LINEAR, "gla": GLAConfig(num_heads=2)}
    table = {name: config for name, config in table.items() if name in pattern.replace("moh+softmax", "moh")}
    options = {"vocab_size": VOCAB, "channel_mixer": GatedMLPConfig(hidden_dim=48), "mixers": table, **options}
    return LMConfig(d_model=WIDTH, num_layers=num_layers, pattern=pattern, **options)


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape or (2, LENGTH), 0, VOCAB)


TOKENS = tokens()


def call(model: LM, tokens: jax.Array = TOKENS, where: dict = PACKED, probe: ProbeConfig | None = None):
    graph, state = nnx.split(model)
    return quick_jit(lambda state: nnx.merge(graph, state)(tokens, **where, probe=probe))(state)


def loss(model: LM) -> jax.Array:
    """Mean next-token loss of the packed rows."""
    logits, _ = model(TOKENS, **PACKED)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(TOKENS, -1, axis=1)[..., None], axis=-1)[..., 0]
    return (nll * REAL).sum() / REAL.sum()


def loss_and_gradients(model: LM):
    graph, state = nnx.split(model)
    value, gradients = quick_jit(jax.value_and_grad(lambda state: loss(nnx.merge(graph, state))))(state)
    return value, {path: g[...] for path, g in nnx.to_flat_state(gradients)}


@pytest.fixture(scope="module")
def hybrid() -> LM:
    """Two scanned periods of two layers and one layer more."""
    return build(lm("gated_deltanet,softmax", 5), seq_len=LENGTH)


@pytest.fixture(scope="module")
def attention() -> LM:
    """The same shape of stack, of softmax layers with and without position encoding: quick to differentiate."""
    mixers = {"softmax": SOFTMAX, "softmax/nope": dataclasses.replace(SOFTMAX, rope_theta=None)}
    return build(lm("softmax,softmax/nope", 5, mixers=mixers), seq_len=LENGTH)


def test_scanned_stack_equals_the_unrolled_one(hybrid):
    labels = [f"{name}/layer{i}" for i, name in enumerate(hybrid.config.layers)]  # distinct names: nothing repeats
    mixers = {label: hybrid.config.mixers[name] for label, name in zip(labels, hybrid.config.layers, strict=True)}
    config = dataclasses.replace(hybrid.config, pattern=",".join(labels), mixers=mixers)
    unrolled = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), seq_len=LENGTH))
    assert (hybrid.stack.period, hybrid.stack.count, unrolled.stack.count) == (2, 2, 1)
    assert unrolled.stack.periods is None

    scanned = dict(nnx.to_flat_state(nnx.state(hybrid)))

    def values(path, variable):
        if path[:2] != ("stack", "rest"):
            return scanned[path]
        layer, rest = path[2], path[3:]
        if layer == 4:
            return scanned["stack", "rest", 0, *rest]
        return variable.replace(scanned["stack", "periods", layer % 2, *rest][...][layer // 2])

    graph, state = nnx.split(unrolled)
    unrolled = nnx.merge(graph, nnx.from_flat_state([(p, values(p, v)) for p, v in nnx.to_flat_state(state)]))
    probe = ProbeConfig(rows=8)
    (expected, expected_stats), (logits, stats) = call(unrolled, probe=probe), call(hybrid, probe=probe)
    assert_close(logits[REAL], expected[REAL])
    assert len(stats) == len(expected_stats) == 5
    for layer, (one, other) in enumerate(zip(stats, expected_stats, strict=True)):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for name, value in vars(other).items():
            if value is not None:
                assert_close(getattr(one, name), value, err_msg=f"{layer} {name}")


def test_recomputation_changes_neither_loss_nor_gradients(attention):
    expected, expected_gradients = loss_and_gradients(attention)
    state = nnx.split(attention)[1]
    for remat in ("full", "dots"):
        config = dataclasses.replace(attention.config, remat=remat)
        graph = nnx.split(nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0), seq_len=LENGTH)))[0]
        value, gradients = loss_and_gradients(nnx.merge(graph, state))
        assert_close(value, expected)
        for path, gradient in gradients.items():
            assert_close(gradient, expected_gradients[path], err_msg=f"{remat} {path}")


@pytest.fixture(scope="module")
def zoo() -> LM:
    """Every registered mixer in one model, and a window; it is scanned over two periods."""
    mixers = {name: config.example() for name, config in MIXERS.all().items() if not hasattr(config, "mixer")}
    mixers |= {"moh+softmax": MoHConfig.example(), "softmax/local": SoftmaxConfig(num_heads=4, head_dim=16, window_size=5)}
    config = LMConfig(
        d_model=64,
        num_layers=2 * len(mixers),
        pattern=",".join(mixers),
        mixers=mixers,
        channel_mixer=GatedMLPConfig(hidden_dim=48),
        vocab_size=VOCAB,
    )
    return build(config, seq_len=LENGTH)


def test_greedy_generation_with_states_equals_full_passes(zoo):
    prompts, new = (4, 9), 8
    graph, params = nnx.split(zoo)
    where, slots = left_padded(*prompts)
    texts = np.array(tokens(2, max(prompts) + new, seed=3))

    prefill = quick_jit(lambda p, *a, **kw: nnx.merge(graph, p).prefill(*a, **kw))
    step = quick_jit(lambda p, *a, **kw: nnx.merge(graph, p).step(*a, **kw))
    prompt = jnp.take_along_axis(jnp.asarray(texts), jnp.asarray(slots), axis=1)
    logits, state = prefill(params, prompt, zoo.init_state(2, max(prompts) + new), **where)
    seen = [logits]
    rows = np.arange(2)
    for i in range(new):
        at = np.asarray(prompts) + i
        texts[rows, at] = chosen = np.argmax(seen[-1], axis=-1)
        logits, state = step(params, jnp.asarray(chosen), state, positions=jnp.asarray(at))
        seen.append(logits)

    full, _ = call(zoo, jnp.asarray(texts), layout(*[(n + new,) for n in prompts], length=texts.shape[1]))
    for row, n in enumerate(prompts):
        expected = full[row, n - 1 : n + new]
        got = jnp.stack([logits[row] for logits in seen])
        assert_close(got, expected)
        np.testing.assert_array_equal(np.argmax(expected[:-1], -1), texts[row, n : n + new])


def test_packed_documents_equal_separate_ones_through_the_whole_model(zoo):
    packed, _ = call(zoo, where=layout((9, 11), (20,), length=LENGTH))
    shifted = TOKENS.at[0, :11].set(TOKENS[0, 9:20])
    alone, _ = call(zoo, shifted, layout((11,), (20,), length=LENGTH))
    assert_close(packed[0, 9:20], alone[0, :11])


def test_tied_model_reads_with_its_embedding():
    model = build(lm("softmax", 1, tie_embeddings=True), seq_len=LENGTH)
    assert model.head is None
    hidden = jax.random.normal(jax.random.key(0), (3, WIDTH))
    assert_close(model.logits(hidden), hidden @ model.embedding[...].T)
    untied = build(lm("softmax", 1), seq_len=LENGTH)
    assert untied.config.num_params() - model.config.num_params() == WIDTH * VOCAB


def test_soft_cap_bounds_the_logits():
    free, capped = (build(lm("softmax", 1, logit_soft_cap=cap), seq_len=LENGTH) for cap in (None, 3.0))
    hidden = 100 * jax.random.normal(jax.random.key(0), (3, WIDTH))
    assert np.abs(free.logits(hidden)).max() > 3
    assert_close(capped.logits(hidden), 3 * np.tanh(np.asarray(free.logits(hidden)) / 3))


def test_block_is_pre_or_post_norm_as_configured():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    for norm in ("pre", "post"):
        model = build(lm("softmax", 1, norm=norm), seq_len=LENGTH)
        assert (model.norm is None) == (norm == "post")
        block = model.stack.rest[0]
        mix = lambda h, block=block: block.mixer(h, **PACKED)[0]
        if norm == "pre":
            h = x + mix(block.mixer_norm(x))
            expected = h + block.channel_mixer(block.channel_norm(h))
        else:
            h = block.mixer_norm(x + mix(x))
            expected = block.channel_norm(h + block.channel_mixer(h))
        assert_close(block(x, **PACKED)[0], expected)


@pytest.mark.parametrize(
    ("pattern", "norm"), [("softmax", "pre"), ("softmax", "post"), ("gated_deltanet", "pre"), ("gla,moh+softmax", "post")]
)
def test_loss_at_the_start_is_that_of_guessing(pattern, norm):
    options = {"mixers": {"moh+softmax": MoHConfig(mixer=SOFTMAX)}} if "moh" in pattern else {}
    graph, state = nnx.split(build(lm(pattern, 2, norm=norm, **options), seq_len=LENGTH))
    value = quick_jit(lambda state: loss(nnx.merge(graph, state)))(state)
    assert value == pytest.approx(math.log(VOCAB), rel=0.02)


def test_attention_at_the_start_is_nearly_uniform():
    model = build(lm("softmax", 1), seq_len=LENGTH)
    _, (stats,) = call(model, where=layout((LENGTH,), (LENGTH,), length=LENGTH), probe=PictureProbe())
    a = np.asarray(stats.attention)
    entropy = -(a * np.log(np.maximum(a, 1e-30))).sum(-1)
    uniform = np.log(np.arange(LENGTH) + 1)
    assert (entropy <= uniform + 1e-5).all()
    assert (uniform - entropy).mean() < 0.75  # logits of unit variance cost half a nat, log n - 1/2
    assert stats.entropy.mean() == pytest.approx(entropy.mean(), abs=1e-3)  # the statistic's own 1e-6 inside the log
    assert stats.sink_rate.max() == 0


def test_bfloat16_model_keeps_float32_parameters_and_follows_the_float32_one(attention):
    config = dataclasses.replace(attention.config, compute_dtype="bfloat16")
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), seq_len=LENGTH)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    half = nnx.merge(graph, nnx.split(attention)[1])
    value, gradients = loss_and_gradients(half)
    expected, _ = loss_and_gradients(attention)
    assert call(half)[0].dtype == jnp.float32
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in gradients.values())
    assert_close(value, expected, dtype=jnp.bfloat16)


def test_rows_of_padding_give_no_nan(zoo):
    logits, stats = call(zoo, where=layout((), (7,), length=LENGTH), probe=ProbeConfig(rows=4))
    for path, leaf in jax.tree.leaves_with_path((logits, stats)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_only_probed_steps_carry_statistics(hybrid, zoo):
    assert call(hybrid)[1] == [None] * 5
    kinds = [config.name for config in zoo.config.layer_mixers]
    _, shown = jax.eval_shape(lambda: zoo(TOKENS, **PACKED))
    for kind, stats in zip(kinds, shown, strict=True):
        assert stats is None if kind != "moh" else [k for k, v in vars(stats).items() if v is not None] == ["auxiliary_loss"]


def test_residual_statistics_do_not_see_padding(hybrid):
    _, stats = call(hybrid, probe=ProbeConfig())
    _, changed = call(hybrid, jnp.where(REAL, TOKENS, (TOKENS + 1) % VOCAB), probe=ProbeConfig())
    for one, other in zip(stats, changed, strict=True):
        assert isinstance(one, Stats)
        for name in ("residual_top", "residual_median", "residual_peak"):
            assert_close(getattr(one, name), getattr(other, name), err_msg=name)

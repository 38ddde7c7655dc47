"""The language model: scan, recomputation, decoding, options, first values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.kernels import Tokens
from plait.models import flow
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.config import LMConfig, pattern_name
from plait.models.lm import LM, num_params
from plait.models.looks.look import Observer
from plait.models.mixers.base import MIXERS, WrapperConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.mega import MegaConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.models.stream import Stream
from plait.tests.models.common import build, layout, left_padded, quick_jit
from plait.tests.tolerances import assert_close, assert_statistics_close
from plait.train.probes.base import Probes
from plait.train.probes.pictures import Pictures
from plait.train.probes.sinks import THRESHOLD

WIDTH, VOCAB, LENGTH = 32, 97, 24
PACKED = layout((9, 11), (LENGTH,), length=LENGTH)
REAL = np.asarray(PACKED.segment_ids > 0)
PROBES = Probes(ProbeConfig(rows=8))
SOFTMAX, LINEAR = SoftmaxConfig(num_heads=2, head_dim=16), GatedDeltaNetConfig(num_heads=2, head_dim=8)


def lm(pattern: str, num_layers: int, **options) -> LMConfig:
    table = {"softmax": SOFTMAX, "gated_deltanet": LINEAR, "gla": GLAConfig(num_heads=2)}
    table = {name: config for name, config in table.items() if name in pattern.replace("moh+softmax", "moh")}
    options = {"vocab_size": VOCAB, "channel_mixer": GatedMLPConfig(hidden_dim=48), "mixers": table, **options}
    return LMConfig(d_model=WIDTH, num_layers=num_layers, pattern=pattern, **options)


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape or (2, LENGTH), 0, VOCAB)


TOKENS = tokens()


@functools.cache
def program(graph: nnx.GraphDef, observer: Observer | None):
    """The compiled call of models of one graph."""
    return quick_jit(lambda state, at: nnx.merge(graph, state)(at, observer=observer))


def call(model: LM, ids: jax.Array = TOKENS, at: Tokens = PACKED, observer: Observer | None = None):
    graph, state = nnx.split(model)
    return jax.tree.map(np.asarray, program(graph, observer)(state, dataclasses.replace(at, ids=ids)))


def loss(model: LM) -> jax.Array:
    """Mean next-token loss of the packed rows."""
    logits, _ = model(dataclasses.replace(PACKED, ids=TOKENS))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(TOKENS, -1, axis=1)[..., None], axis=-1)[..., 0]
    return (nll * REAL).sum() / REAL.sum()


@functools.cache
def differentiated(graph: nnx.GraphDef):
    """The compiled loss of models of one graph, with its gradients."""
    return quick_jit(jax.value_and_grad(lambda state: loss(nnx.merge(graph, state))))


def loss_and_gradients(model: LM):
    graph, state = nnx.split(model)
    value, gradients = differentiated(graph)(state)
    return value, {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(gradients)}


@pytest.fixture(scope="module")
def hybrid() -> LM:
    """Two scanned periods of two layers and one layer more."""
    return build(lm("gated_deltanet,softmax", 5), seq_len=LENGTH)


@pytest.fixture(scope="module")
def attention() -> LM:
    """The same shape of stack, of softmax layers with and without position encoding: quick to differentiate."""
    mixers = {"softmax": SOFTMAX, "softmax/nope": dataclasses.replace(SOFTMAX, positions=None)}
    return build(lm("softmax,softmax/nope", 5, mixers=mixers), seq_len=LENGTH)


def test_scanned_stack_equals_the_unrolled_one(hybrid):
    labels = [f"{name}/layer{i}" for i, name in enumerate(hybrid.config.layers)]  # distinct names: nothing repeats
    mixers = {label: hybrid.config.mixers[name] for label, name in zip(labels, hybrid.config.layers, strict=True)}
    config = dataclasses.replace(hybrid.config, pattern=",".join(labels), mixers=mixers)
    unrolled = nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=LENGTH))
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
    (expected, others), (logits, extras) = call(unrolled, observer=PROBES), call(hybrid, observer=PROBES)
    assert_close(logits[REAL], expected[REAL])
    assert len(extras) == len(others) == 5
    for layer, (one, other) in enumerate(zip(extras, others, strict=True)):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for name, value in other.statistics.items():
            assert_statistics_close(one.statistics[name], value, err_msg=f"{layer} {name}")


def test_few_layers_are_the_same_without_a_loop(monkeypatch: pytest.MonkeyPatch):
    graph, state = nnx.split(build(lm("softmax", 2), seq_len=LENGTH))
    at = dataclasses.replace(PACKED, ids=TOKENS)

    def traced() -> jax.stages.Traced:
        return jax.jit(lambda state: nnx.merge(graph, state)(at)[0]).trace(state)

    flat = traced()
    monkeypatch.setattr(flow, "FEW", 1)
    loop = traced()
    assert "unroll=2" in str(flat.jaxpr)
    assert "unroll=1" in str(loop.jaxpr)
    logits, expected = (one.lower().compile()(state) for one in (flat, loop))
    assert_close(logits[REAL], expected[REAL])


def test_recomputation_changes_neither_loss_nor_gradients(attention):
    expected, expected_gradients = loss_and_gradients(attention)
    state = nnx.split(attention)[1]
    for remat in ("full", "dots"):
        config = dataclasses.replace(attention.config, remat=remat)
        graph = nnx.split(nnx.eval_shape(lambda config=config: LM(config, rngs=nnx.Rngs(0), seq_len=LENGTH)))[0]
        value, gradients = loss_and_gradients(nnx.merge(graph, state))
        assert_close(value, expected)
        for path, gradient in gradients.items():
            assert_close(gradient, expected_gradients[path], err_msg=f"{remat} {path}")


def test_long_left_padded_prompts_keep_their_sink_tokens():
    """More places than one dense tile of attention has."""
    n, padding = 530, 46
    model = build(
        lm("softmax", 1, mixers={"softmax": dataclasses.replace(SOFTMAX, window_size=16, num_sink_tokens=3)}), seq_len=n
    )
    ids = tokens(1, n)
    whole, _ = call(model, ids, layout((n,), length=n))
    graph, state = nnx.split(model)
    at = layout((n,), length=n)
    left = Tokens(*(jnp.pad(x, ((0, 0), (padding, 0))) for x in (ids, at.segment_ids, at.positions)))
    prefill = quick_jit(lambda state, at: (m := nnx.merge(graph, state)).prefill(at, m.init_state(1, n + padding))[0])
    for positions in (left.positions, None):
        assert_close(prefill(state, dataclasses.replace(left, positions=positions)), whole[:, -1])


def _zoo(mixers: dict, **options) -> LM:
    return build(
        LMConfig(
            d_model=64,
            num_layers=2 * len(mixers),
            pattern=",".join(mixers),
            mixers=mixers,
            channel_mixer=GatedMLPConfig(hidden_dim=48),
            vocab_size=VOCAB,
            **options,
        ),
        seq_len=LENGTH,
    )


@pytest.fixture(scope="module", params=["families", pytest.param("all", marks=pytest.mark.slow)])
def zoo(request) -> LM:
    """A model, scanned over two periods, of every kind of decode memory, or of every registered mixer."""
    if request.param == "all":
        examples = causal_examples()
        wrapped = {f"{name}+{c.mixer.name}": c for name, c in examples.items() if isinstance(c, WrapperConfig)}
        return _zoo({name: c for name, c in examples.items() if not isinstance(c, WrapperConfig)} | wrapped)
    softmax = SoftmaxConfig.example()
    part = dataclasses.replace(softmax, window_size=5, num_sink_tokens=2)
    return _zoo(
        {
            "softmax": softmax,
            "softmax/local": dataclasses.replace(softmax, window_size=5),
            "gated_deltanet": GatedDeltaNetConfig.example(),
            "moh+softmax": MoHConfig.example(),
            "mla": MLAConfig.example(),
            "mega": MegaConfig.example(),  # whose empty state depends on its parameters
            "parallel": ParallelConfig(parts=(part, GLAConfig.example())),
            "hgrn2": HGRN2Config(head_dim=16, lower_bounds="model", conv_size=3),
        },
        channel_mixers={"gated_deltanet": MLPConfig(hidden_dim=48, token_shift=True)},
        embedding_norm=True,
    )


def causal_examples():
    examples = {name: config.example() for name, config in MIXERS.all().items()}
    return {name: config for name, config in examples.items() if "causal" in config.directions}


@pytest.mark.parametrize("name", causal_examples())
def test_every_mixer_has_decode_states_in_repeated_layers(name):
    """Traced only: shapes of states, from empty to stepped."""
    mixer = causal_examples()[name]
    called = pattern_name(mixer)
    config = LMConfig(d_model=64, num_layers=2, pattern=called, mixers={called: mixer}, vocab_size=VOCAB, channel_mixer=None)

    def states(ids):
        model = LM(config, rngs=nnx.Rngs(0), seq_len=8)
        empty = model.init_state(2, 12)
        _, filled = model.prefill(Tokens(ids), empty)
        _, stepped = model.step(Tokens(ids[:, :1], None, jnp.full((2, 1), 8)), filled)
        return empty, filled, stepped

    empty, filled, stepped = jax.eval_shape(states, jnp.zeros((2, 8), jnp.int32))
    assert empty == filled == stepped


def test_greedy_generation_with_states_equals_full_passes(zoo):
    prompts, new = (4, 9), 8
    graph, params = nnx.split(zoo)
    at, index = left_padded(*prompts)
    texts = np.array(tokens(2, max(prompts) + new, seed=3))

    prefill = quick_jit(lambda p, *args: nnx.merge(graph, p).prefill(*args))
    step = quick_jit(lambda p, *args: nnx.merge(graph, p).step(*args))
    prompt = jnp.take_along_axis(jnp.asarray(texts), jnp.asarray(index), axis=1)
    logits, state = prefill(params, dataclasses.replace(at, ids=prompt), zoo.init_state(2, max(prompts) + new))
    seen = [logits]
    rows = np.arange(2)
    for i in range(new):
        position = np.asarray(prompts) + i
        texts[rows, position] = chosen = np.argmax(seen[-1], axis=-1)
        one = Tokens(jnp.asarray(chosen)[:, None], None, jnp.asarray(position)[:, None])
        logits, state = step(params, one, state)
        seen.append(logits)

    full, _ = call(zoo, jnp.asarray(texts), layout(*[(n + new,) for n in prompts], length=texts.shape[1]))
    for row, n in enumerate(prompts):
        expected = full[row, n - 1 : n + new]
        got = np.stack([logits[row] for logits in np.asarray(seen)])
        assert_close(got, expected)
        np.testing.assert_array_equal(np.argmax(expected[:-1], -1), texts[row, n : n + new])


def test_packed_documents_equal_separate_ones_through_the_whole_model(zoo):
    packed, _ = call(zoo, at=layout((9, 11), (20,), length=LENGTH))
    shifted = TOKENS.at[0, :11].set(TOKENS[0, 9:20])
    alone, _ = call(zoo, shifted, layout((11,), (20,), length=LENGTH))
    assert_close(packed[0, 9:20], alone[0, :11])


def test_parameters_are_counted_wherever_they_are(zoo):
    assert num_params(zoo.config) == sum(p.size for p in jax.tree.leaves(nnx.state(zoo, nnx.Param)))


def test_tied_model_reads_with_its_embedding():
    model = build(lm("softmax", 1, tie_embeddings=True), seq_len=LENGTH)
    assert model.head is None
    hidden = jax.random.normal(jax.random.key(0), (3, WIDTH))
    assert_close(model.logits(hidden), hidden @ model.embedding[...].T)
    untied = build(lm("softmax", 1), seq_len=LENGTH)
    assert num_params(untied.config) - num_params(model.config) == WIDTH * VOCAB


def test_soft_cap_bounds_the_logits():
    free, capped = (build(lm("softmax", 1, logit_soft_cap=cap), seq_len=LENGTH) for cap in (None, 3.0))
    hidden = 100 * jax.random.normal(jax.random.key(0), (3, WIDTH))
    assert np.abs(free.logits(hidden)).max() > 3
    assert_close(capped.logits(hidden), 3 * np.tanh(np.asarray(free.logits(hidden)) / 3))


def test_block_norms_before_or_after_or_not_at_all_as_configured():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    for norm in ("pre", "post", "none", "input"):
        model = build(lm("softmax", 1, norm=norm, stream_scale=3.5 if norm == "input" else None), seq_len=LENGTH)
        assert (model.norm is None) == (norm in ("post", "none"))
        block = model.stack.rest[0]
        mix = lambda h, block=block: block.mixer(h, at=PACKED, carry={}).y
        channels = lambda h, block=block: block.channel_mixer(h, at=PACKED).y

        @quick_jit
        def both(x, norm=norm, block=block, mix=mix, channels=channels):
            if norm == "pre":
                h = x + mix(block.mixer_norm(x))
                expected = h + channels(block.channel_norm(h))
            elif norm == "post":
                h = block.mixer_norm(x + mix(x))
                expected = block.channel_norm(h + channels(h))
            elif norm == "input":
                h = block.mixer_norm(x)
                h = block.channel_norm(3.5 * h + mix(h))
                expected = 3.5 * h + channels(h)
            else:
                h = x + mix(x)
                expected = h + channels(h)
            return block(Stream(x), at=PACKED)[0].x, expected

        assert_close(*both(x))


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
    at = layout((LENGTH,), (LENGTH,), length=LENGTH)
    (picture,), (shown,) = (call(model, at=at, observer=o)[1] for o in (Pictures(), Probes(ProbeConfig(sequences=1))))
    a, shown = np.asarray(picture.statistics["attention"]), shown.statistics
    entropy = -(a * np.log(np.maximum(a, 1e-30))).sum(-1)
    uniform = np.log(np.arange(LENGTH) + 1)
    assert (entropy <= uniform + 1e-5).all()
    assert (uniform - entropy).mean() < 0.75  # logits of unit variance cost half a nat, log n - 1/2
    assert shown["entropy"].mean() == pytest.approx(entropy.mean(), abs=1e-3)
    assert shown["sink"][:, 0].max() < THRESHOLD


def test_bfloat16_model_keeps_float32_parameters_and_follows_the_float32_one(attention):
    config = dataclasses.replace(attention.config, compute_dtype="bfloat16")
    graph, state = nnx.split(nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0), seq_len=LENGTH)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    half = nnx.merge(graph, nnx.split(attention)[1])
    value, gradients = loss_and_gradients(half)
    expected, _ = loss_and_gradients(attention)
    assert call(half)[0].dtype == jnp.float32
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in gradients.values())
    assert_close(value, expected, dtype=jnp.bfloat16)


OF_LONGER_ROWS = ("induction", "duplicate_token", "previous_token", "sink_rate", "sink_elsewhere")
"""Statistics of what a document of seven tokens has not got: a token that comes again, queries enough after one."""


def test_rows_of_padding_give_no_nan(zoo):
    logits, extras = call(zoo, at=layout((), (7,), length=LENGTH), observer=Probes(ProbeConfig(rows=4)))
    for path, leaf in jax.tree.leaves_with_path((logits, [e.losses for e in extras])):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    for config, one in zip(zoo.config.layer_mixers, extras, strict=True):
        for name, value in one.statistics.items():
            part_has_none = len(set(config.head_kinds(zoo.config.d_model))) > 1 and np.isfinite(value).any()
            assert np.isfinite(value).all() or part_has_none or name in OF_LONGER_ROWS, (config.name, name)


def test_only_probed_steps_carry_statistics(hybrid, zoo):
    assert [(e.losses, e.statistics) for e in call(hybrid)[1]] == [({}, {})] * 5
    _, shown = jax.eval_shape(lambda: zoo(dataclasses.replace(PACKED, ids=TOKENS)))
    for config, extras in zip(zoo.config.layer_mixers, shown, strict=True):
        assert list(extras.losses) == {"moh": ["balance/moh"], "transfer": ["transfer"]}.get(config.name, [])
        assert not extras.statistics


def test_residual_statistics_do_not_see_padding(hybrid):
    _, extras = call(hybrid, observer=PROBES)
    _, changed = call(hybrid, jnp.where(REAL, TOKENS, (TOKENS + 1) % VOCAB), observer=PROBES)
    for one, other in zip(extras, changed, strict=True):
        for name in ("residual_top", "residual_median", "residual_peak"):
            assert_close(one.statistics[name], other.statistics[name], err_msg=name)


def test_scales_multiply_the_embedding_the_halves_of_blocks_and_the_logits():
    """Of a model without norms, whose mixer gives zeros, and of one block, by its parts."""
    ids = tokens(1, 6, seed=0)
    mixer = {"softmax": SoftmaxConfig.example()}
    make = lambda **options: build(
        LMConfig(d_model=64, num_layers=1, pattern="softmax", mixers=mixer, vocab_size=VOCAB, norm="none", **options), seq_len=6
    )
    logits = lambda model: call(model, ids, layout((6,), length=6))[0]

    def silent(model):
        model.stack.rest[0].mixer.o.kernel[...] *= 0
        return model

    plain = logits(silent(make(channel_mixer=None)))
    assert_close(logits(silent(make(channel_mixer=None, embedding_scale=3.0))), 3 * plain)
    assert_close(logits(silent(make(channel_mixer=None, logit_scale=0.25))), 0.25 * plain)
    assert_close(logits(make(channel_mixer=None, residual_scale=0.5)), (plain + logits(make(channel_mixer=None))) / 2)

"""Every probe and statistic: what it declares it gives, padding is not seen, and its value is the one worked out by hand."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.kernels import AttentionStats
from plait.kernels.recurrence import RecurrenceStats
from plait.models.lm import LM
from plait.models.looks.look import Look
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.mixers.parallel.parallel import ParallelConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import hybrid
from plait.train.probes import means
from plait.train.probes.base import PROBES, Probe, Probes, chosen, register, statistics
from plait.train.probes.sinks import THRESHOLD
from plait.train.probes.statistic import Statistic

LENGTH, CONFIG = 40, ProbeConfig(only="all", rows=8, sequences=2, far=8)
SINK = SoftmaxConfig(num_heads=2, head_dim=8, num_kv_heads=1, sink_logits=True)
MIXERS = {
    **hybrid().model.mixers,
    "parallel": ParallelConfig(parts=(SINK, Mamba2Config.example())),
    "softmax": SoftmaxConfig(num_heads=2, head_dim=8, normalizer="sigmoid"),
}
MODEL = dataclasses.replace(hybrid().model, num_layers=4, pattern="gated_deltanet,moh+softmax,parallel,softmax", mixers=MIXERS)
HEADS = [len(mixer.head_kinds(MODEL.d_model)) for mixer in MODEL.layer_mixers]


def made(config):
    """Graph and arrays of a model."""
    create = lambda: LM(config.with_vocab(32), rngs=nnx.Rngs(0), seq_len=LENGTH)
    return nnx.split(nnx.eval_shape(create))[0], quick_jit(lambda: nnx.split(create())[1])()


@pytest.fixture(scope="module")
def measured():
    """`measure(ids)`: the statistics of each layer, of rows of which the second ends in padding."""
    graph, state = made(MODEL)
    at = layout((LENGTH - 5, 5), (LENGTH - 8,), length=LENGTH)

    @quick_jit
    def measure(ids):
        observer = Probes(CONFIG)
        _, extras = nnx.merge(graph, state).hidden(dataclasses.replace(at, ids=ids), observer=observer)
        return observer.across([one.statistics for one in extras])

    return measure, np.asarray(at.segment_ids)


IDS = np.random.default_rng(0).integers(0, 32, (2, LENGTH)).astype(np.int32)


def test_every_statistic_is_as_declared(measured):
    found, declared = measured[0](IDS), statistics()
    for layer, heads in zip(found, HEADS, strict=True):
        for name, value in layer.items():
            assert value.dtype == jnp.float32 and value.shape == declared[name].shape(heads, CONFIG), name
            assert not np.isinf(value).any(), name
    for name in declared.keys() & {name for layer in found for name in layer}:
        assert any(np.isfinite(layer[name]).any() for layer in found if name in layer), name


def test_heads_without_a_value_are_nan_beside_those_that_have_one(measured):
    """The parallel layer's: attention has logits, a state has a horizon."""
    layer = measured[0](IDS)[2]
    for name, heads in (("max_logit", slice(0, 2)), ("decay_horizon", slice(2, None))):
        there = np.isfinite(layer[name])
        assert there[heads].all() and there.sum() == there[heads].size, name


def test_padding_is_not_seen(measured):
    measure, segment_ids = measured
    changed = measure(np.where(segment_ids > 0, IDS, (IDS + 1) % 32))
    for layer, other in zip(measure(IDS), changed, strict=True):
        for name, value in layer.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("probe", PROBES.all().values(), ids=PROBES.all())
def test_declarations_are_whole(probe):
    assert probe.source and probe.__doc__ and probe.statistics
    for one in probe.statistics:
        assert one.name.isidentifier() and one.unit and one.meaning and one.per in ("layer", "head")
        assert one.metric is None or (one.metric.name.count("/") == 1 and one.metric.meaning)
        assert one.panel is None or not (one.panel.map and one.per == "layer"), "a map has a row a head"
        assert one.event is None or (one.event.kind.isidentifier() and one.event.limits and one.event.meaning)


def test_no_name_is_declared_twice():
    every = [one for probe in chosen() for one in probe.statistics]
    assert len({one.name for one in every}) == len(every)
    metrics = [(one.metric.name, one.by_source) for one in every if one.metric is not None]
    assert len(set(metrics)) == len(metrics)


def test_only_some_probes_run():
    assert [probe.name for probe in Probes(ProbeConfig(only="sinks, entropy")).probes] == ["sinks", "entropy"]
    default = [name for name, probe in PROBES.all().items() if probe.by_default]
    assert [probe.name for probe in Probes(ProbeConfig()).probes] == default
    assert [probe.name for probe in Probes(ProbeConfig(only="all")).probes] == list(PROBES.all())
    assert [probe.name for probe in Probes(ProbeConfig(only="default,sinks")).probes] == default
    with pytest.raises(ValueError, match=r"probe.only='entropi': probe 'entropi' is not registered; did you mean 'entropy'\?"):
        Probes(ProbeConfig(only="entropi"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"other": jnp.zeros(2)}, r"probe 'test_probe' measured 'other'; declare it, it has the statistics \['shape'\]"),
        ({"shape": jnp.zeros(3)}, r"probe 'test_probe': shape.shape=\(3,\) must be \(2,\), as it is declared"),
    ],
)
def test_a_probe_that_measures_something_else_is_refused(value, message):
    @register("test_probe", source="here")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TestProbe(Probe):
        statistics = (Statistic(name="shape", per="head", unit="none", meaning="none"),)

        def measure(self, look, config):
            return value

    try:
        with pytest.raises(ValueError, match=message):
            Probes(ProbeConfig(only="test_probe")).measure((look_at(np.zeros((1, 2, 1, 1)), [[1]]),))
    finally:
        PROBES.forget("test_probe")


# Values worked out by hand, on looks at a mixer that shows what it is given.


class Values(NamedTuple):
    v: Any


@dataclasses.dataclass
class Shown:
    """A mixer with this attention `[B, H, T, S]`, in which what else it tells is `observed`."""

    attention: Any
    observed: dict

    @property
    def num_heads(self):
        return self.attention.shape[1]

    def implied(self, inputs, rows, *, at):
        return jnp.asarray(self.attention, jnp.float32)[:, :, rows]

    def observe(self, inputs, x, *, at):
        return self.observed


def look_at(weights, documents, /, *, ids=None, v=None, residual=None, **observed):
    """All rows of sequences of these documents, the rest padding."""
    weights = np.asarray(weights, np.float64)
    batch, _, length, _ = weights.shape
    at = dataclasses.replace(layout(*map(tuple, documents), length=length), ids=None if ids is None else jnp.asarray(ids))
    blank = jnp.zeros((batch, length, 1))
    v = jnp.zeros((batch, length, 1, 1)) if v is None else jnp.asarray(v, jnp.float32)
    residual = blank if residual is None else jnp.asarray(residual, jnp.float32)
    mixer = Shown(weights, observed)
    return Look(at=at, x=blank, rows=jnp.arange(length), mixer=mixer, inputs=Values(v), residual=residual)  # type: ignore[arg-type]


def measure(probe, look, config=CONFIG):
    """The statistics of one probe on one look, and the names that it has values of."""
    return Probes(dataclasses.replace(config, only=probe)).measure((look,))


def on(length, *places):
    """Attention `[1, 1, length, length]` with all weight of row i on `places[i]`."""
    return np.eye(length)[list(places)][None, None]


def test_entropy_by_hand():
    """Rows: one key; half and half; all on one of three; and padding."""
    rows = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1]], float)[None, None]
    found = measure("entropy", look_at(np.concatenate([rows, -3 * rows], 1), [[3]]))
    assert_close(found["entropy"], np.full(2, np.log(2) / 3, np.float32))
    assert_close(found["entropy_ratio"], np.full(2, 0.5, np.float32))  # 1 and 0 of the rows that see two or more


def test_exact_entropy_takes_the_place_of_that_of_looked_at_rows():
    stats = AttentionStats(*(jnp.full((1, 4, 1), value) for value in (0.0, 2.0, 0.6, 0.5)))
    found = measure("entropy", look_at(on(4, 0, 0, 0, 0), [[3]], attention=stats))
    assert_close(found["entropy"], np.float32([0.6]))
    assert_close(found["entropy_ratio"], np.float32([(0.6 / np.log(2) + 0.6 / np.log(3)) / 2]))


def test_sinks_by_hand():
    """Two documents of two and three: alpha_1 over all five rows, alpha_2 over the three that are at the second token or after."""
    half = on(6, 0, 0, 2, 2, 3, 0)
    found = measure("sinks", look_at(np.concatenate([half, on(6, 0, 1, 2, 3, 4, 0)], 1), [[2, 3]]), ProbeConfig(first_k=2))
    assert_close(found["sink"], np.float32([[4 / 5, 1 / 3], [2 / 5, 2 / 3]]))
    assert np.isnan(found["sink_rate"]).all(), "two and three tokens tell of no sink"
    assert "sink_elsewhere" not in found


def drawn(length, *rows):
    """Weights `[B, 1, length, length]` and the documents' lengths, of rows of (tokens, weight of every later token on the first)."""
    weights = np.zeros((len(rows), 1, length, length))
    for row, documents in zip(weights[:, 0], rows, strict=True):
        start = 0
        for size, share in documents:
            every = np.arange(start, start + size)
            row[every, every] = 1 - share
            row[every, start] = share
            row[start, start] = 1
            start += size
    return weights, [[size for size, _ in documents] for documents in rows]


def rate(weights, documents, *, exact):
    """The sink rate of all rows, as a mixer tells it or as its implied attention shows it."""
    look = look_at(weights, documents)
    if exact:
        starts = np.asarray(look.at.positions == 0) & np.asarray(look.at.segment_ids > 0)
        first = jnp.asarray((weights * starts[:, None, None]).sum(-1).swapaxes(1, 2), jnp.float32)  # [B, T, H]
        stats = AttentionStats(*[first] * 4)
        look = look_at(weights, documents, attention=stats, first_masses=lambda first_k: first[..., None])
    return float(measure("sinks", look, ProbeConfig(first_k=1))["sink_rate"][0])


@pytest.mark.parametrize("exact", [True, False])
def test_sink_rate_takes_the_threshold_of_each_document_before_the_mean(exact):
    assert rate(*drawn(40, [(40, 1.0)], [(40, 0.0)]), exact=exact) == 0.5  # their mean is above the threshold
    rows = drawn(120, [(32, 0.4), (40, 0.2), (8, 1.0)], [(120, 0.25)])  # the first row's mean is above it too
    assert rate(*rows, exact=exact) == pytest.approx(1 / 3)
    assert 0.25 < THRESHOLD < 0.4


@pytest.mark.parametrize("exact", [True, False])
def test_padding_has_no_part_in_the_sink_rate(exact):
    rows = drawn(120, [(50, 0.32)], [], [(40, 0.0), (40, 1.0)], [])  # with padding the first one's mean would be 0.14
    assert rate(*rows, exact=exact) == pytest.approx(2 / 3)


@pytest.mark.parametrize("exact", [True, False])
def test_uniform_attention_has_no_sinks_in_short_documents(exact):
    sizes = (3, 5, 8, 2, 6, 36, 4)
    weights = np.zeros((1, 1, 70, 70))
    for start, size in zip(np.cumsum((0, *sizes)), sizes):
        weights[0, 0, start : start + size, start : start + size] = np.tri(size) / np.arange(1, size + 1)[:, None]
    assert rate(weights, [sizes], exact=exact) == 0


def test_shares_of_a_row_do_not_depend_on_its_size():
    a = jnp.asarray([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    for size in (1e-36, 1.0, 1e30):
        assert_close(means.weights(a * size), np.float32([[0.25, 0.75, 0], [0, 0, 0]]))


def test_sinks_of_all_rows_take_the_place_of_those_of_looked_at_rows():
    """The first weight from the statistics of the op, the others from its masses."""
    stats = AttentionStats(*(jnp.full((1, 4, 1), value) for value in (0.0, 2.0, 0.6, 0.25)))
    masses = jnp.asarray([0.25, 0.5])[None, None, None] * jnp.asarray([1, 1, 2, 9.0])[None, :, None, None]
    look = look_at(on(4, 0, 0, 0, 0), [[3]], attention=stats, first_masses=lambda first_k: masses[..., :first_k])
    found = measure("sinks", look, ProbeConfig(first_k=2))
    assert_close(found["sink"], np.float32([[0.25, (0.5 + 1.0) / 2]]))


def test_sink_elsewhere_by_hand():
    """The first tokens and those with few queries do not count, whatever they get; then the mean of all later queries."""
    mass = np.zeros((2, 80, 1))
    mass[:, 0], mass[:, 40], mass[:, 79] = 70.0, 39.0, 1.0  # document starts, and the last token's own
    mass[0, 3], mass[1, 3] = 37 * 0.5, 37 * 0.1  # 37 queries from it on
    mass[0, 20] = 20 * 0.9  # only 20
    look = look_at(np.zeros((2, 1, 80, 80)), [[40, 40], [40]], column_mass=lambda: jnp.asarray(mass, jnp.float32))
    assert_close(measure("sinks", look)["sink_elsewhere"], np.float32([(0.5 + 0.1) / 2]))
    short = look_at(np.zeros((1, 1, 20, 20)), [[20]], column_mass=lambda: jnp.ones((1, 20, 1)))
    assert np.isnan(measure("sinks", short)["sink_elsewhere"]).all()


def test_induction_by_hand():
    """a b c a b | a a: rows 3 and 4 have an occurrence before; the token just before the query is none."""
    ids = [[7, 8, 9, 7, 8, 7, 7, 0]]
    head = on(8, 0, 0, 0, 1, 2, 5, 5, 0)  # looks at what followed: b for the second a, c for the second b
    half = on(8, 0, 0, 0, 1, 4, 5, 6, 0)  # the first of them alone
    none = on(8, 0, 0, 1, 2, 3, 5, 5, 0)  # the token before
    found = measure("induction", look_at(np.concatenate([head, -2 * half, none], 1), [[5, 2]], ids=ids))
    assert_close(found["induction"], np.float32([1, 0.5, 0]))
    assert_close(found["previous_token"], np.float32([2 / 5, 1 / 5, 1]))
    assert_close(found["duplicate_token"], np.float32([0, 0, 0]))


def test_duplicate_tokens_by_hand():
    """As above: the head that looks at the occurrences, and one that looks at the first of them alone."""
    ids = [[7, 8, 9, 7, 8, 7, 7, 0]]
    heads = np.concatenate([on(8, 0, 0, 0, 0, 1, 5, 5, 0), on(8, 0, 0, 0, 0, 4, 5, 5, 0)], 1)
    assert_close(measure("induction", look_at(heads, [[5, 2]], ids=ids))["duplicate_token"], np.float32([1, 0.5]))


def test_induction_takes_the_last_occurrence_of_the_same_document():
    ids = [[7, 8, 7, 9, 7, 8], [7, 8, 9, 7, 8, 9]]
    head = np.concatenate([on(6, 0, 0, 1, 0, 3, 2), on(6, 0, 0, 0, 1, 1, 3)])
    assert_close(measure("induction", look_at(head, [[6], [2, 4]], ids=ids))["induction"], np.float32([1.0]))
    once = measure("induction", look_at(on(3, 0, 0, 1), [[3]], ids=[[1, 2, 3]]))
    assert np.isnan(once["induction"]).all() and np.isfinite(once["previous_token"]).all()
    assert measure("induction", look_at(on(3, 0, 0, 1), [[3]])) == {}, "without token ids"


def test_logits_by_hand():
    peak = jnp.asarray([[3.0, 5.0, 99.0]])[..., None]
    stats = AttentionStats(peak, peak, peak, peak)
    assert_close(measure("logits", look_at(on(3, 0, 0, 0), [[2]], attention=stats))["max_logit"], np.float32([5]))
    assert measure("logits", look_at(on(3, 0, 0, 0), [[2]])) == {}


def test_memory_by_hand():
    """Two spans of 3 tokens and 1: the mean of -g by token, of writes by token; the state of the last."""
    one = lambda *values: jnp.asarray(values, jnp.float32)[None, :, None]
    fields = {"decay_horizon": one(2.0, 4.0), "write_strength": one(1.0, 5.0), "num_tokens": one(3.0, 1.0)}
    stats = RecurrenceStats(**{name: fields.get(name, one(0.0, 0.0)) for name in RecurrenceStats._fields})
    state = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])[None, None]
    found = measure("memory", look_at(on(4, 0, 0, 0, 0), [[4]], recurrence=stats, memory=state))
    assert_close(found["decay_horizon"], np.float32([1 / (0.75 / 2 + 0.25 / 4)]))
    assert_close(found["write_strength"], np.float32([2]))
    assert_close(found["state_norm"], np.float32([5]))


def test_head_load_by_hand():
    load = jnp.asarray([1.0, 0.25])
    assert_close(measure("head_load", look_at(np.zeros((1, 2, 3, 3)), [[3]], load=load))["head_load"], np.float32([1, 0.25]))


def test_value_drain_by_hand():
    """Of two value heads for four: starts of norm 1 and 2, else 4 and 2."""
    v = np.zeros((1, 5, 2, 2))
    v[0, :, 0, 0], v[0, :, 1, 1] = [1, 4, 1, 4, 9], [2, 2, 2, 2, 9]
    found = measure("value_drain", look_at(np.zeros((1, 4, 5, 5)), [[2, 2]], v=v))
    assert_close(found["value_drain"], np.float32([0.25, 0.25, 1, 1]))


def test_residual_by_hand():
    x = np.ones((2, 4, 2))
    x[0, 0], x[0, 2, 1], x[0, 3], x[1, 1, 0], x[1, 2:] = [-6, 6], 3, 99, -2, 99
    found = measure("residual", look_at(np.zeros((2, 1, 4, 4)), [[3], [2]], residual=x))
    assert_close(found["residual_top"], np.float32([(6 + 2) / 2, (6 + 1) / 2, (3 + 1) / 2]))
    assert_close(found["residual_median"], np.float32(1))
    rest = (1 + np.sqrt(5) + np.sqrt(2.5)) / 3  # root mean squares of (1, 1), (1, 3) and (2, 1)
    assert_close(found["residual_peak"], np.float32((6 + 1) / 2 / rest))


def test_massive_activations_by_hand():
    """Above 100 and above 1000 times the median, 0.1: not where one of the two does not hold, nor in padding."""
    x = np.full((2, 8, 4), 0.1)
    x[0, 1, 2], x[0, 5, 2], x[1, 0, 3], x[0, 2, 0], x[1, 4:] = 200, -300, 150, 99, 999
    look = look_at(np.zeros((2, 1, 8, 8)), [[8], [4]], residual=x)
    found = measure("massive_activations", look)
    assert_close(found["massive_activations"], np.float32(3 / 2))
    assert_close(found["massive_channels"], np.float32(2))
    usual = measure("massive_activations", dataclasses.replace(look, residual=look.residual + 1.0))
    assert not usual["massive_activations"], "200 times the median"


def test_masses_of_softmax_heads_are_those_of_the_dense_weights():
    """What the mixer tells probes of all rows agrees with its implied attention, sink logits left out of the shares."""
    config = dataclasses.replace(MODEL, num_layers=1, pattern="softmax", mixers={"softmax": SINK})
    graph, state = made(config)
    where = layout((LENGTH - 5, 5), (LENGTH - 8,), length=LENGTH)

    class Whole:
        """An observer of everything that keeps what the mixer tells."""

        whole = False
        pick_sequences = staticmethod(lambda batch: slice(0, batch))
        pick_rows = staticmethod(jnp.arange)

        def measure(self, looks):
            (look,) = looks
            told = look.observed
            return {"weights": look.implied, "first": told["first_masses"](first_k=3), "columns": told["column_mass"]()}

    @quick_jit
    def tell():
        _, (extras,) = nnx.merge(graph, state).hidden(dataclasses.replace(where, ids=jnp.asarray(IDS)), observer=Whole())
        return extras.statistics

    found = jax.tree.map(np.asarray, tell())
    shares = found["weights"] / np.maximum(found["weights"].sum(-1, keepdims=True), 1e-30)
    real = np.asarray(where.segment_ids) > 0
    assert_close(found["columns"], np.where(real[:, None, :, None], shares, 0).sum(2).swapaxes(1, 2))
    segments, positions = np.asarray(where.segment_ids), np.asarray(where.positions)
    document = (segments[:, :, None] == segments[:, None, :]) & real[:, None]
    for k in range(3):
        at_k = document & (positions == k)[:, None, :]
        assert_close(found["first"][..., k], np.where(at_k[:, None], shares, 0).sum(-1).swapaxes(1, 2) * real[..., None])

"""Watchers of probes: each thing once, the right kind, at the right step, and the same across a resume."""

import dataclasses
import json
import math

import numpy as np
import pytest

from plait.train.probes.base import chosen
from plait.train.probes.docs import every_watcher
from plait.train.probes.sinks import THRESHOLD
from plait.train.probes.statistic import Statistic, Threshold
from plait.train.probes.thresholds import ThresholdWatcher
from plait.train.watching.spikes import LossSpikes
from plait.train.watching.watchers import load_states, states

LAYERS = [
    {"index": 0, "mixer": "gated_deltanet", "kind": "linear", "num_heads": 2, "head_kinds": ["state", "state"]},
    {"index": 1, "mixer": "softmax", "kind": "full", "num_heads": 2, "head_kinds": ["attention", "attention"]},
]


def probe(**changes):
    """Quiet probes of two layers with two heads; `name=[(index, value), ...]` changes entries."""
    arrays = {
        "entropy_ratio": np.full((2, 2), 0.8),
        "sink": np.full((2, 2, 4), 0.05),
        "sink_rate": np.zeros((2, 2)),
        "max_logit": np.array([[np.nan, np.nan], [5.0, 6.0]]),
        "residual_top": np.full((2, 3), 10.0),
        "residual_median": np.full(2, 0.5),
        "induction": np.full((2, 2), np.nan),
    }
    for name, entries in changes.items():
        for index, value in entries:
            arrays[name][index] = value
    return arrays


class Watching:
    """All watchers of events, in one list as in a run."""

    def __init__(self, layers=LAYERS):
        self.watchers = [LossSpikes(), *(watcher for probe in chosen() for watcher in probe.watchers(layers))]

    def update(self, step, probes=None, loss=None):
        values = {**(probes or {}), **({} if loss is None else {"loss/train": loss})}
        return [event for watcher in self.watchers for event in watcher.update(step, values)]


def feed(watching, stream):
    return [
        (event.step, event.kind, event.layer, event.head) for step, probes in stream for event in watching.update(step, probes)
    ]


def test_quiet_run_has_no_events():
    assert feed(Watching(), [(step, probe()) for step in range(0, 500, 50)]) == []


def test_sink_onset_is_reported_once_at_the_first_step_above():
    sink = probe(sink=[((1, 0, 0), THRESHOLD + 0.01)])
    assert feed(Watching(), [(0, probe()), (50, sink), (100, probe()), (150, sink)]) == [(50, "sink_onset", 1, 0)]


def test_sink_present_from_the_start_is_no_onset_until_it_has_gone():
    sink, flicker = probe(sink=[((0, 1, 0), 0.4)]), probe(sink=[((0, 1, 0), 0.29)])
    watching = Watching()
    events = watching.update(0, sink)
    assert [event.kind for event in events] == ["sink_at_start"] and "since the first probe" in events[0].message
    assert feed(watching, [(50, sink), (100, flicker), (150, sink)]) == []
    assert feed(watching, [(200, probe()), (250, sink), (300, sink)]) == [(250, "sink_onset", 0, 1)]


def test_sink_rate_of_the_model_is_an_event_without_layer():
    some = probe(sink_rate=[((1, 0), 0.6)])
    assert feed(Watching(), [(0, probe()), (50, some)]) == [(50, "model_sink_onset", None, None)]
    (event,) = Watching().update(0, some)
    assert (event.kind, event.message) == (
        "model_sink_at_start",
        "15% of (head, document) pairs have a sink, already at the first probe",
    )


def test_low_entropy_alone_concerns_the_head_and_with_a_loss_spike_the_model():
    low = probe(entropy_ratio=[((1, 0), 0.01), ((1, 1), 0.02)])
    assert feed(Watching(), [(0, probe()), (50, low)]) == [(50, "entropy_collapse", 1, 0), (50, "entropy_collapse", 1, 1)]
    spiked = Watching()
    for step in range(40):
        assert spiked.update(step, loss=3.0) == []
    assert [event.kind for event in spiked.update(40, loss=9.0)] == ["loss_spike"]
    assert (50, "model_entropy_collapse", None, None) in feed(spiked, [(45, probe()), (50, low)])
    late = Watching()
    for step in range(41):
        late.update(step, loss=9.0 if step == 40 else 3.0)
    assert (241, "model_entropy_collapse", None, None) not in feed(late, [(45, probe()), (241, low)]), "more than 200 steps after"


def test_low_entropy_at_the_first_probe_says_so():
    low = probe(entropy_ratio=[((1, 0), 0.01)])
    assert feed(Watching(), [(0, low), (50, low)]) == [(0, "low_entropy_at_start", 1, 0)]


def test_a_linear_head_that_forgets_fast_has_not_collapsed():
    low = probe(entropy_ratio=[((0, 0), 0.01)])
    assert feed(Watching(), [(0, low), (50, low)]) == []


def test_heads_of_a_parallel_layer_are_what_they_are_themselves():
    """A state beside attention may forget fast without collapse; the model's mean leaves it out too."""
    layers = [{"index": 0, "mixer": "parallel", "kind": "parallel", "num_heads": 2, "head_kinds": ["attention", "state"]}]
    one = lambda attention, state: {"entropy_ratio": np.array([[attention, state]])}
    assert feed(Watching(layers), [(0, one(0.8, 0.8)), (50, one(0.8, 0.01))]) == []
    assert feed(Watching(layers), [(0, one(0.8, 0.8)), (50, one(0.01, 0.8))]) == [(50, "entropy_collapse", 0, 0)]
    spiked = Watching(layers)
    for step in range(41):
        spiked.update(step, loss=9.0 if step == 40 else 3.0)
    assert feed(spiked, [(42, one(0.15, 0.01)), (45, one(0.09, 0.8))]) == [(45, "model_entropy_collapse", None, None)]


def test_collapse_of_a_sink_head_names_the_sink():
    events = Watching()
    events.update(0, probe())
    found = events.update(50, probe(entropy_ratio=[((1, 0), 0.01)], sink=[((1, 0, 0), 0.98)]))
    assert "it is a sink" in next(event.message for event in found if event.kind == "entropy_collapse")


def test_each_logit_threshold_is_reported_once():
    stream = [(0, probe()), (50, probe(max_logit=[((1, 1), 120.0)])), (100, probe(max_logit=[((1, 0), 1500.0)]))]
    watching = Watching()
    found = [event for step, probes in stream for event in watching.update(step, probes)]
    assert [(e.step, e.head, e.threshold) for e in found] == [(50, 1, 50.0), (50, 1, 100.0), (100, 0, 1000.0)]
    assert found[1].message == "the largest attention logit of layer 1 (softmax) head 1 is 120, above 100"


def test_massive_activation_needs_both_conditions():
    large = probe(residual_top=[((0, 0), 200.0)])  # 400 times the median
    massive = probe(residual_top=[((1, 0), 900.0)])
    watching = Watching()
    assert watching.update(0, large) == []
    (event,) = watching.update(50, massive)
    assert (event.kind, event.layer, event.head, event.value) == ("massive_activation", 1, None, 900.0)
    assert event.message == "massive activation after layer 1: |x| reaches 900, 1,800 times the median"
    assert watching.update(100, massive) == []


def test_an_induction_head_emerges():
    head = probe(induction=[((1, 1), 0.6)])
    assert feed(Watching(), [(0, probe()), (50, head), (100, head)]) == [(50, "induction_onset", 1, 1)]


def watcher_of(statistic, **options):
    event = Threshold(kind="big", limits=(1.0,), meaning="", message="{where}: {value:g}, {limit:g}", **options)
    return ThresholdWatcher(dataclasses.replace(statistic, event=event))


OF_LAYER = Statistic(name="size", per="layer", unit="", meaning="", size=lambda config: 2)
OF_HEAD = Statistic(name="size", per="head", unit="", meaning="")


@pytest.mark.parametrize(
    ("statistic", "options", "now", "expected"),
    [
        (OF_LAYER, {}, [[2.0, 0.0]], [(0, None, 2.0, "layer 0: 2, 1")]),
        (OF_LAYER, {}, [[0.0, 2.0]], []),
        (OF_LAYER, {"per": "model"}, [[2.0, 0.0], [4.0, 0.0]], [(None, None, 3.0, "the model: 3, 1")]),
        (OF_HEAD, {}, [[0.0, 2.0, np.nan]], [(0, 1, 2.0, "layer 0 head 1: 2, 1")]),
        (OF_HEAD, {"per": "layer"}, [[2.0, 3.0, np.nan]], [(0, 1, 3.0, "layer 0 head 1: 3, 1")]),
        (OF_HEAD, {"per": "layer", "below": True}, [[2.0, 0.5, 0.7]], [(0, 1, 0.5, "layer 0 head 1: 0.5, 1")]),
        (OF_HEAD, {"per": "layer"}, [[np.nan, np.nan]], []),
        (OF_HEAD, {"per": "model"}, [[np.nan, 4.0]], [(None, None, 4.0, "the model: 4, 1")]),
    ],
)
def test_where_a_threshold_looks(statistic, options, now, expected):
    """Of a trailing axis at the first entry, of what layers have at no head."""
    now = np.array(now)
    watcher = watcher_of(statistic, **options)
    assert watcher.update(0, {"size": np.full_like(now, 9.0 if options.get("below") else 0.0)}) == []
    found = watcher.update(1, {"size": now})
    assert [(event.layer, event.head, event.value, event.message) for event in found] == expected
    assert watcher.update(2, {"size": now}) == []


def test_loss_spike_is_one_event_until_the_loss_is_back():
    watcher, found = LossSpikes(), []
    for step, loss in enumerate([4.0] * 20 + [6.0] * 3 + [4.0] * 5 + [math.nan] * 2 + [4.0]):
        found += watcher.update(step, {"loss/train": loss})
    assert [event.step for event in found] == [20, 28]
    assert "not finite" in found[1].message
    assert found[0].message == "loss 6.000; the last 20 losses have the median 4.000" and found[0].threshold == 4.4


def test_falling_noisy_loss_does_not_spike():
    rng = np.random.default_rng(0)
    watcher = LossSpikes()
    steps = np.arange(2000)
    losses = 2.5 + 8 * np.exp(-steps / 150) + rng.normal(0, 0.05, 2000)
    assert not [e for step, loss in zip(steps, losses) for e in watcher.update(int(step), {"loss/train": float(loss)})]


def stream_of_events():
    rng = np.random.default_rng(1)
    for step in range(100):
        changes = {"sink": [((1, 0, 0), step / 150), ((0, 0, 0), 0.5 - step / 150)], "max_logit": [((1, 1), 3.0 * step)]}
        changes |= {"residual_top": [((0, 0), 20.0 * step)], "entropy_ratio": [((1, 0), 0.04 if step > 40 else 0.5)]}
        loss = 4 + rng.normal(0, 0.02) + 3 * (step in (55, 56))
        yield step, probe(**changes) if step % 5 == 0 else None, loss


KINDS = {"sink_onset", "sink_at_start", "logit_growth", "loss_spike", "entropy_collapse", "massive_activation"}


@pytest.mark.parametrize("cut", [0, 1, 30, 55, 60, 99])
def test_resume_from_json_state_repeats_nothing_and_loses_nothing(cut):
    stream = list(stream_of_events())
    whole, first, second = Watching(), Watching(), Watching()
    expected = [event for item in stream for event in whole.update(*item)]
    found = [event for item in stream[:cut] for event in first.update(*item)]
    load_states(second.watchers, {"watchers": json.loads(json.dumps(states(first.watchers), allow_nan=False))})
    found += [event for item in stream[cut:] for event in second.update(*item)]
    assert found == expected and {event.kind for event in expected} >= KINDS


OLD = {
    "first_probe": 0,
    "fired": ["sink/1/0", "sink/model", "entropy/1/1", "entropy/model", "logit/1/50", "activation/0"],
    "held": ["sink/0/1"],
    "losses": [3.0] * 32,
    "spiking": False,
    "last_spike": 90,
}


def test_a_checkpoint_of_one_detector_is_gone_on_with():
    """What it had reported is not reported again, what held since its first probe is no onset, and its losses still count."""
    watching = Watching()
    load_states(watching.watchers, {"events": OLD})
    again = probe(sink=[((1, 0, 0), 0.5), ((0, 1, 0), 0.5)], sink_rate=[((1, 0), 1.0)], max_logit=[((1, 1), 60.0)])
    again |= {"entropy_ratio": np.array([[0.8, 0.8], [0.8, 0.01]]), "residual_top": np.array([[900.0] * 3, [10.0] * 3])}
    assert watching.update(100, again) == []
    low = again | {"entropy_ratio": np.array([[0.8, 0.8], [0.01, 0.01]])}
    assert feed(watching, [(105, low)]) == [(105, "entropy_collapse", 1, 0)], "that of the model was reported"
    new = again | {"max_logit": np.array([[np.nan] * 2, [60.0, 150.0]]), "residual_top": np.full((2, 3), 900.0)}
    assert feed(watching, [(110, new)]) == [(110, "logit_growth", 1, 1), (110, "massive_activation", 1, None)]
    assert [event.kind for event in watching.update(111, loss=3.5)] == ["loss_spike"]


def test_missing_probes_are_fine():
    assert Watching().update(0, {"entropy": np.ones((2, 2))}, 3.0) == []


def test_events_survive_strict_json():
    (event,) = LossSpikes().update(0, {"loss/train": math.inf})
    assert event.to_dict()["kind"] == "loss_spike" and "step 0" not in event.message


def test_watchers_have_names_of_their_own_and_say_what_they_find():
    watchers = every_watcher()
    assert len({watcher.name for watcher in watchers}) == len(watchers)
    assert all(kind and when for watcher in watchers for kind, when in watcher.kinds.items())
    assert {event.kind for item in [Watching()] for step in stream_of_events() for event in item.update(*step)} <= {
        kind for watcher in watchers for kind in watcher.kinds
    }

"""Detectors: each thing once, the right kind, at the right step, and the same across a resume."""

import json
import math

import numpy as np
import pytest

from plait.train.probes.events import EventDetector, EventThresholds

LAYERS = [
    {"index": 0, "mixer": "gated_deltanet", "kind": "linear", "num_heads": 2},
    {"index": 1, "mixer": "softmax", "kind": "full", "num_heads": 2},
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
    }
    for name, entries in changes.items():
        for index, value in entries:
            arrays[name][index] = value
    return arrays


def feed(detector, stream):
    return [
        (event.step, event.kind, event.layer, event.head) for step, probes in stream for event in detector.update(step, probes)
    ]


def test_quiet_run_has_no_events():
    assert feed(EventDetector(LAYERS), [(step, probe()) for step in range(0, 500, 50)]) == []


def test_sink_onset_is_reported_once_at_the_first_step_above():
    sink = probe(sink=[((1, 0, 0), 0.31)])
    assert feed(EventDetector(LAYERS), [(0, probe()), (50, sink), (100, probe()), (150, sink)]) == [(50, "sink_onset", 1, 0)]


def test_sink_present_from_the_start_is_no_onset_until_it_has_gone():
    sink, flicker = probe(sink=[((0, 1, 0), 0.4)]), probe(sink=[((0, 1, 0), 0.29)])
    detector = EventDetector(LAYERS)
    events = detector.update(0, sink)
    assert [event.kind for event in events] == ["sink_at_start"] and "since the first probe" in events[0].message
    assert feed(detector, [(50, sink), (100, flicker), (150, sink)]) == []
    assert feed(detector, [(200, probe()), (250, sink), (300, sink)]) == [(250, "sink_onset", 0, 1)]


def test_sink_rate_of_the_model_is_an_event_without_layer():
    some = probe(sink_rate=[((1, 0), 0.6)])
    assert feed(EventDetector(LAYERS), [(0, probe()), (50, some)]) == [(50, "sink_onset", None, None)]


def test_low_entropy_alone_concerns_the_head_and_with_a_loss_spike_the_model():
    low = probe(entropy_ratio=[((1, 0), 0.01), ((1, 1), 0.02)])
    calm = EventDetector(LAYERS)
    assert feed(calm, [(0, probe()), (50, low)]) == [(50, "entropy_collapse", 1, 0), (50, "entropy_collapse", 1, 1)]
    spiked = EventDetector(LAYERS)
    for step in range(40):
        assert spiked.update(step, loss=3.0) == []
    assert [event.kind for event in spiked.update(40, loss=9.0)] == ["loss_spike"]
    assert (50, "entropy_collapse", None, None) in feed(spiked, [(45, probe()), (50, low)])


def test_low_entropy_at_the_first_probe_says_so():
    low = probe(entropy_ratio=[((1, 0), 0.01)])
    assert feed(EventDetector(LAYERS), [(0, low), (50, low)]) == [(0, "low_entropy_at_start", 1, 0)]


def test_a_linear_head_that_forgets_fast_has_not_collapsed():
    low = probe(entropy_ratio=[((0, 0), 0.01)])
    assert feed(EventDetector(LAYERS), [(0, low), (50, low)]) == []


def test_collapse_of_a_sink_head_names_the_sink():
    events = EventDetector(LAYERS)
    events.update(0, probe())
    found = events.update(50, probe(entropy_ratio=[((1, 0), 0.01)], sink=[((1, 0, 0), 0.98)]))
    assert "it is a sink" in next(event.message for event in found if event.kind == "entropy_collapse")


def test_each_logit_threshold_is_reported_once():
    stream = [(0, probe()), (50, probe(max_logit=[((1, 1), 120.0)])), (100, probe(max_logit=[((1, 0), 1500.0)]))]
    detector = EventDetector(LAYERS)
    found = [event for step, probes in stream for event in detector.update(step, probes)]
    assert [(e.step, e.head, e.threshold) for e in found] == [(50, 1, 50.0), (50, 1, 100.0), (100, 0, 1000.0)]


def test_massive_activation_needs_both_conditions():
    large = probe(residual_top=[((0, 0), 200.0)])  # 400 times the median
    massive = probe(residual_top=[((1, 0), 900.0)])
    assert feed(EventDetector(LAYERS), [(0, large), (50, massive), (100, massive)]) == [(50, "massive_activation", 1, None)]


def test_loss_spike_is_one_event_until_the_loss_is_back():
    detector, found = EventDetector(), []
    for step, loss in enumerate([4.0] * 20 + [6.0] * 3 + [4.0] * 5 + [math.nan] * 2 + [4.0]):
        found += detector.update(step, loss=loss)
    assert [event.step for event in found] == [20, 28]
    assert "not finite" in found[1].message


def test_falling_noisy_loss_does_not_spike():
    rng = np.random.default_rng(0)
    detector = EventDetector()
    steps = np.arange(2000)
    losses = 2.5 + 8 * np.exp(-steps / 150) + rng.normal(0, 0.05, 2000)
    assert not [event for step, loss in zip(steps, losses) for event in detector.update(int(step), loss=float(loss))]


@pytest.mark.parametrize("cut", [0, 1, 30, 55, 60, 99])
def test_resume_from_json_state_repeats_nothing_and_loses_nothing(cut):
    rng = np.random.default_rng(1)
    stream = []
    for step in range(100):
        changes = {"sink": [((1, 0, 0), step / 150), ((0, 0, 0), 0.5 - step / 150)], "max_logit": [((1, 1), 3.0 * step)]}
        loss = 4 + rng.normal(0, 0.02) + 3 * (step in (55, 56))
        stream.append((step, probe(**changes) if step % 5 == 0 else None, loss))
    whole, first, second = EventDetector(LAYERS), EventDetector(LAYERS), EventDetector(LAYERS)
    expected = [event for item in stream for event in whole.update(*item)]
    found = [event for item in stream[:cut] for event in first.update(*item)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [event for item in stream[cut:] for event in second.update(*item)]
    assert found == expected and {event.kind for event in expected} >= {
        "sink_onset",
        "sink_at_start",
        "logit_growth",
        "loss_spike",
    }


def test_thresholds_are_frozen_and_missing_probes_are_fine():
    with pytest.raises(AttributeError):
        EventThresholds().sink = 0.5
    assert EventDetector(LAYERS).update(0, {"entropy": np.ones((2, 2))}, 3.0) == []


def test_events_survive_strict_json():
    (event,) = EventDetector().update(0, loss=math.inf)
    assert event.to_dict()["kind"] == "loss_spike" and "step 0" not in event.message

"""Spikes: which steps are, that their update is left out, that a run goes back, and that a resumed run does all of it alike."""

import itertools
import json

import numpy as np
import pytest

from plait.configs.spike import SpikeConfig
from plait.data.loader import DataIterator
from plait.tests.suites import usually
from plait.tests.train.common import changed, different_arrays, tiny
from plait.tests.train.test_resume import last_state, lines_of, terminating
from plait.train.checkpoint import Checkpoints
from plait.train.loop import train
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.pods.hosts.layout import BatchLayout
from plait.train.watching.actions import Actions, Rewind
from plait.train.watching.spikes import LossSpikes, SpikeWatch


def watched(losses, **options):
    """A watch that has taken in these losses as steps 1, 2, ... with norm 1."""
    watch = SpikeWatch(SpikeConfig(sigma=5.0, window=8, **options))
    for step, loss in enumerate(losses, 1):
        watch.note(step, loss, 1.0)
    return watch


def test_bounds_are_robust_deviations_above_the_median_of_the_steps_two_and_more_before():
    losses = [3.0, 2.0, 4.0, 3.0, 2.5, 3.5, 3.0, 3.0, 100.0]
    deviation = 1.4826 * np.median(np.abs(np.array(losses[:8]) - 3.0))
    assert watched(losses).bounds(10) == pytest.approx([3.0 + max(5 * deviation, 0.3), 1.1])
    assert np.isinf(watched([3.0, 3.0]).bounds(3)).all(), "too little is known"


def test_a_spike_says_what_spiked_and_by_how_much():
    watch = watched([3.0] * 8)
    assert watch.note(9, 3.2, 1.0) is None
    assert watch.note(10, 9.0, 1.0) == "the loss of step 10 was 9, above 3.3"
    assert watch.note(11, 3.0, 7.0) == "the gradient norm of step 11 was 7, above 1.1"
    assert watch.note(12, float("nan"), 1.0) is None, "another rule's"


def test_the_bounds_go_on_from_the_state():
    watch, again = watched(range(3, 12)), SpikeWatch(SpikeConfig(sigma=5.0, window=8))
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert (again.bounds(10) == watch.bounds(10)).all()


def test_what_a_watch_does_about_a_spike():
    """Skips it, or goes back where there is a checkpoint before it."""
    usual = [(step, {"loss/train": 3.0, "grad/norm": 1.0}) for step in range(1, 10)]
    spike = (10, {"loss/train": 9.0, "grad/norm": 1.0})
    for action, every in (("skip", 4), ("rewind", 10)):
        watch = SpikeWatch(SpikeConfig(sigma=5.0, window=8))
        assert [event for item in usual for event in watch.update(*item)] == []
        (event,) = Actions(acting(action, every)).take(10, watch.update(*spike))
        assert (event.kind, event.value, event.threshold) == ("spike_skipped", 9.0, pytest.approx(3.3)), (action, every)
        assert event.message == "the loss of step 10 was 9, above 3.3: its update was left out"
    with pytest.raises(Rewind, match=r"the loss of step 10 was 9, above 3\.3"):
        Actions(acting("rewind", 9)).take(10, [event])


def acting(action, every):
    return tiny({"steps": 20, "checkpoint_every": every, "spike.sigma": 5.0, "spike.action": action})


def test_reporting_and_leaving_out_follow_one_rule():
    """Each with its own constants and window; the watch leaves out the two last steps, which are read late."""
    losses = [3.0, 2.0, 4.0, 3.0, 2.5, 3.5, 3.0, 3.0]
    reporting = LossSpikes(sigma=5.0, window=8)
    for step, loss in enumerate(losses, 1):
        reporting.update(step, {"loss/train": loss})
    (event,) = reporting.update(9, {"loss/train": 99.0})
    assert event.threshold == pytest.approx(watched([*losses, 99.0]).bounds(10)[0])


@pytest.mark.parametrize(("changes", "message"), [({"sigma": 0.0}, "spike.sigma=0.0"), ({"window": 3}, "spike.window=3")])
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SpikeConfig(**changes)


STEPS, BAD = 24, 14


@pytest.fixture
def spiked(corpus, monkeypatch):
    """A config of which training batch 14 (and whatever else `spike` names) is all noise, which a trained model finds unlikely."""
    config = tiny({"data.source": str(corpus), "steps": STEPS, "checkpoint_every": 4, "keep_last": 9, "data.val_fraction": 0.0})
    config = changed(config, {"spike.sigma": 20.0, "spike.window": 8, "optimizer.learning_rate": 3e-2})
    rng, place = np.random.default_rng(0), BatchLayout.place
    noise = rng.integers(0, 256, (4, 16)).astype(np.int32)

    def placing(layout, batch):
        return place(layout, batch._replace(targets=noise) if spike(batch) else batch)

    targets: set[bytes] = set()
    spike = lambda batch: batch.targets.tobytes() in targets
    monkeypatch.setattr(BatchLayout, "place", placing)

    def make(out, *bad, **changes):
        from plait.train import run as runs

        made = changed(config, {"out": str(out), **changes})
        data = runs.set_up(changed(made, {"out": str(out) + "-data"})).data.train()
        targets.clear()
        targets.update(batch.targets.tobytes() for i, batch in enumerate(itertools.islice(data, STEPS), 1) if i in bad)
        data.close()
        return made

    return make


def events_of(out):
    return [
        e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["kind"] in ("rewind", "spike_skipped")
    ]


def test_a_skipped_spike_changes_no_parameter(spiked, compile_cache, tmp_path):
    config = spiked(tmp_path / "run", BAD, **{"checkpoint_every": 1, "keep_last": 99})
    train(config)
    (event,) = events_of(tmp_path / "run")
    assert (event["kind"], event["step"]) == ("spike_skipped", BAD)
    states = [state_at(config, step).params for step in (BAD - 1, BAD, BAD + 1)]
    assert different_arrays(states[0], states[1]) == [] != different_arrays(states[1], states[2])
    skipped = {r["step"]: r["optimizer/skipped_steps"] for r in lines_of(tmp_path / "run" / "metrics.jsonl") if "loss/train" in r}
    assert skipped[BAD - 1] == 0 and skipped[BAD] == skipped[STEPS] == 1


def state_at(config, step):
    from plait.train import run as runs

    checkpoints = Checkpoints(runs.Path(config.folder) / "checkpoints", read_only=True)
    try:
        return checkpoints.restore(runs.set_up(config).like, step)[1]
    finally:
        checkpoints.close()


def test_a_rewind_goes_back_to_the_checkpoint_and_leaves_out_the_batches_since(spiked, compile_cache, tmp_path):
    config = spiked(tmp_path / "run", BAD, **{"spike.action": "rewind"})
    train(config)
    (event,) = events_of(tmp_path / "run")
    assert (
        event["kind"] == "rewind" and event["value"] == BAD and "back to step 12, leaving out the 2 batches" in event["message"]
    )
    _, data, _, tokens = last_state(tmp_path / "run")
    assert data["step"] == STEPS + 2 and tokens == STEPS * 64
    steps = [r["step"] for r in lines_of(tmp_path / "run" / "metrics.jsonl") if "loss/train" in r]
    assert steps == list(range(1, STEPS + 1)), "each step once"


def test_before_the_first_checkpoint_a_spike_is_only_left_out(spiked, compile_cache, tmp_path):
    config = spiked(tmp_path / "run", BAD, **{"spike.action": "rewind", "checkpoint_every": 20})
    train(config)
    assert [(event["kind"], event["step"]) for event in events_of(tmp_path / "run")] == [("spike_skipped", BAD)]


@pytest.mark.parametrize(
    ("stop", "saved"), usually([(13, 13), (15, 12), (17, 14)], (15, 12)), ids=["before it", "at it", "after it"]
)
def test_a_rewind_is_the_same_in_a_run_that_was_stopped(stop, saved, spiked, compile_cache, tmp_path, monkeypatch):
    """`stop` counts the batches, `saved` is the step at which the run then ends."""
    train(spiked(tmp_path / "whole", BAD, **{"spike.action": "rewind"}))
    config = spiked(tmp_path / "run", BAD, **{"spike.action": "rewind"})
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(stop))
        assert train(config).step == saved
    train(changed(config, {"resume": True}))
    assert different_arrays(last_state(tmp_path / "run"), last_state(tmp_path / "whole")) == []
    for name in ("metrics.jsonl", "events.jsonl"):
        assert lines_of(tmp_path / "run" / name) == lines_of(tmp_path / "whole" / name), name


def test_too_many_rewinds_end_the_run(spiked, compile_cache, tmp_path):
    config = spiked(tmp_path / "run", *range(BAD, BAD + 6), **{"spike.action": "rewind", "spike.max_rewinds": 1})
    with pytest.raises(TrainingFailed, match=r"spike\.max_rewinds=1"):
        train(config)

"""Actions: what an event asks for happens, at the step that is said, once, and alike in a run that was stopped and resumed."""

import json

import numpy as np
import pytest

from plait.configs import codec
from plait.configs.command_line.cli import parse_experiment
from plait.configs.event import EventConfig
from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import optimizer
from plait.data.loader import DataIterator
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, different_arrays, program_of, random_batch, tiny
from plait.tests.train.test_resume import last_state, lines_of, terminating
from plait.train.loop import Result, train
from plait.train.optimizers.schedule import make_schedule
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.probes.base import Probes, chosen
from plait.train.probes.collect import describe_layers, told
from plait.train.watching.actions import Actions, Rewind, check_told, watchers_of
from plait.train.watching.spikes import LossSpikes
from plait.train.watching.watchers import Event, load_states, states

STEPS, AT = 12, 5


def event(step, kind="loss_spike", head=None):
    return Event(step, kind, None, head, 9.0, 3.0, "the loss jumped")


def acting(steps=STEPS, every=4, **actions):
    table = {kind: one if isinstance(one, EventConfig) else EventConfig(action=one) for kind, one in actions.items()}
    return tiny({"steps": steps, "checkpoint_every": every, "event": table})


def test_saving_and_stopping_come_a_step_later_and_a_lower_rate_two():
    actions = Actions(
        acting(loss_spike="checkpoint", logit_growth="stop", sink_onset=EventConfig(action="lower_rate", factor=0.25))
    )
    found = actions.take(5, [event(5), event(5, "logit_growth"), event(5, "sink_onset", 0), event(5, "sink_onset", 1)])
    assert (actions.saves, actions.stops, actions.rates) == ([6], [6], [[7, 0.25]])
    assert [one.message.partition("; ")[2] for one in found] == [
        "step 6 is saved and kept",
        "the run stops after step 6",
        "from step 7 on the learning rate is 0.25 times what it was",
        "",
    ]
    actions.take(8, [event(8, "sink_onset", 2)])
    assert [float(actions.rate(step)) for step in (6, 7, 9, 10)] == [1, 0.25, 0.25, 0.0625]


def test_kinds_without_an_action_and_the_last_step_ask_for_nothing():
    actions = Actions(acting(loss_spike="stop"))
    assert actions.take(5, [event(5, "sink_onset")]) == [event(5, "sink_onset")]
    assert actions.take(STEPS, [event(STEPS)]) == [event(STEPS)] and actions.stops == []


def test_a_rewind_needs_a_checkpoint_before_the_step_and_comes_before_all_else():
    actions = Actions(acting(loss_spike="rewind", sink_onset="stop"))
    assert actions.take(4, [event(4)]) == [event(4)], "that of step 4 is not yet saved"
    with pytest.raises(Rewind, match="the loss jumped") as raised:
        actions.take(5, [event(5, "sink_onset"), event(5)])
    assert raised.value.step == 5 and actions.stops == []


def test_what_was_asked_for_goes_through_a_checkpoint():
    actions, again = (Actions(acting(loss_spike="lower_rate", sink_onset="stop")) for _ in range(2))
    actions.take(5, [event(5), event(5, "sink_onset")])
    load_states([again], {"watchers": json.loads(json.dumps(states([actions])))})
    assert again.state_dict() == actions.state_dict() and again.rate(7) == 0.5


def test_rewinds_of_a_checkpoint_from_before_there_were_other_actions_are_counted_on():
    actions = Actions(acting())
    load_states([actions], {"watchers": {"spikes": {"recent": [], "rewinds": 3}}})
    assert actions.rewinds == 3 and actions.saves == []


def limited(kind, limit):
    config = tiny({"event": {kind: EventConfig(limit=limit)}, "probe_every": 1})
    return next(watcher for watcher in watchers_of(config, chosen("default"))[0] if kind in watcher.kinds)


def test_a_limit_replaces_those_that_are_declared():
    watcher = limited("logit_growth", 7.0)
    values = lambda *logits: {"max_logit": np.array([logits])}
    assert [event.threshold for event in watcher.update(1, values(6.0, 8.0))] == [7.0]
    assert watcher.update(2, values(60.0, 2000.0)) == []
    spikes = limited("loss_spike", 50.0)
    assert isinstance(spikes, LossSpikes)
    for step in range(1, 33):
        spikes.update(step, {"loss/train": 3.0 + 0.1 * (step % 2)})
    assert spikes.update(33, {"loss/train": 4.0}) == [], "above 6 deviations, below 50"
    assert limited("model_entropy_collapse", 0.4).limits["model_entropy_collapse"] == (0.4,)


@pytest.mark.parametrize(("limit", "found"), [(None, ["model_entropy_collapse"]), (50.0, [])])
def test_what_counts_as_a_spike_counts_for_the_collapse_after_one_too(limit, found):
    config = tiny({"event": {"loss_spike": EventConfig(limit=limit)}, "probe_every": 1})
    watcher = next(watcher for watcher in watchers_of(config, chosen("entropy"))[0] if "model_entropy_collapse" in watcher.kinds)
    for step in range(1, 33):
        watcher.update(step, {"loss/train": 3.0 + 0.1 * (step % 2)})
    watcher.update(33, {"loss/train": 4.0})
    assert [event.kind for event in watcher.update(34, {"entropy_ratio": np.array([[0.01, 0.02]])})] == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event": {"sink_onst": EventConfig()}}, r"event\.sink_onst is no kind of event; did you mean 'sink_onset'\?"),
        ({"event": {"sink_onset": EventConfig()}}, r"event\.sink_onset is found by the probe 'sinks', and probe_every=None"),
        (
            {"event": {"sink_onset": EventConfig()}, "probe_every": 5, "probe.only": "entropy"},
            r"event\.sink_onset is found by the probe 'sinks', which probe\.only='entropy' leaves out; use --probe\.only entropy,sinks",
        ),
        ({"event": {"spike_skipped": EventConfig(action="stop")}}, r"event\.spike_skipped needs .* spike\.sigma is None"),
        (
            {"event": {"spike_skipped": EventConfig(action="rewind")}, "spike.sigma": 6.0, "checkpoint_every": 2},
            r"event\.spike_skipped\.action=rewind is what spike\.action=rewind says",
        ),
        (
            {"event": {"massive_activation": EventConfig(limit=9.0)}, "probe_every": 5},
            r"event\.massive_activation\.limit=9 replaces none.* use .*logit_growth",
        ),
        (
            {"event": {"loss_spike": EventConfig(action="rewind")}},
            r"event\.loss_spike\.action=rewind needs checkpoints to go back to, not checkpoint_every=None of steps=6; set checkpoint_every",
        ),
        (
            {"event": {"loss_spike": EventConfig(action="rewind")}, "checkpoint_every": 6},
            r"event\.loss_spike\.action=rewind needs .* not checkpoint_every=6 of steps=6; set checkpoint_every, to less than the steps",
        ),
        (
            {"spike.action": "rewind", "spike.sigma": 6.0},
            r"spike\.action=rewind needs checkpoints to go back to, not checkpoint_every=None",
        ),
        (
            {"spike.action": "rewind", "checkpoint_every": 2},
            r"spike\.action=rewind needs a rule .* spike\.sigma is None; set --spike",
        ),
        (
            {"event": {"rewind": EventConfig(action="lower_rate")}},
            r"event\.rewind is of runs that go back, and this one does not",
        ),
        (
            {"event": {kind: EventConfig(action="rewind") for kind in ("rewind", "loss_spike")}, "checkpoint_every": 2},
            r"event\.rewind\.action=rewind would go back for having gone back; use lower_rate",
        ),
        (
            {"event": {"sink_onset": EventConfig(limit=3.0)}, "probe_every": 5},
            r"event\.sink_onset\.limit=3 must be between 0 and 1, where what it is of lies; use 0\.3",
        ),
        (
            {"event": {"model_entropy_collapse": EventConfig(limit=1.0)}, "probe_every": 5},
            r"event\.model_entropy_collapse\.limit=1 must be between 0 and 1",
        ),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_anything_starts(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(changed(tiny(), {"out": str(tmp_path / "run"), **changes}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("load_collapse", "softmax"), ("logit_growth", "gla"), ("entropy_collapse", "gla")],
)
def test_an_event_of_what_no_layer_tells_is_refused(kind, pattern, corpus, tmp_path):
    """One that some layer tells is not: the same model beside another layer, or another event of it."""
    mixers = {"gla": GLAConfig(num_heads=2), "softmax": tiny().model.mixers["softmax"]}
    changes = {"data.source": str(corpus), "out": str(tmp_path / "run"), "probe_every": 5}

    def config(kind, pattern):
        mine = {name: mixers[name] for name in pattern.split(",")}
        return changed(tiny(), {**changes, "model.pattern": pattern, "model.mixers": mine, "event": {kind: EventConfig()}})

    with pytest.raises(ValueError, match=rf"event\.{kind} would never happen: no layer of model\.pattern='{pattern}' tells"):
        train(config(kind, pattern))
    assert not (tmp_path / "run" / "config.json").exists()
    for known in (config("entropy_collapse", "gla,softmax"), config("logit_growth", "gla,softmax"), config("sink_onset", "gla")):
        probes = Probes(known.probe)
        names = told(program_of(known).blueprint, probes)
        check_told(known, watchers_of(known, probes.probes, describe_layers(known.model))[0], names)


def test_the_table_on_the_command_line_and_in_json():
    config = parse_experiment("lm_tiny", ["--event.sink-onset.action", "stop", "--event.logit_growth.limit=80"])
    assert config.event == {"sink_onset": EventConfig(action="stop"), "logit_growth": EventConfig(limit=80.0)}
    assert codec.decode(ExperimentConfig, json.loads(json.dumps(codec.encode(config)))) == config
    for words, message in {
        "--event.sink_onset.action halt": r"event\.sink_onset\.action='halt' must be one of warn, checkpoint, stop, lower_rate",
        "--event.sink_onset.limit -1": r"event\.sink_onset\.limit=-1\.0 must be a finite number above 0",
        "--event.sink_onset.limit nan": r"event\.sink_onset\.limit=nan must be a finite number above 0",
        "--event.sink_onset.factor nan": r"event\.sink_onset\.factor=nan must be a finite number above 0",
        "--event.sink_onset.actoin stop": r"did you mean --event\.sink-onset\.action",
        "--event.sink_onset.factor 0.1": r"event\.sink_onset\.factor=0\.1 is of action=lower_rate, not warn",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_experiment("lm_tiny", words.split())


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_lower_rate_makes_smaller_updates_and_the_metric_says_so(name):
    program = program_of(changed(tiny(), {"optimizer": optimizer(name, learning_rate=1e-2, warmup_steps=0)}))
    step = program.lower(controls={"rate": np.ones((), np.float32)}).compile()
    place = program.layout.place
    found = {}
    for rate in (1.0, 0.25):
        fresh = program.fresh()
        old = {key: np.array(value) for key, value in fresh.params.items()}
        state, metrics = step(fresh, place(random_batch()), rate=np.float32(rate))
        found[rate] = {key: np.asarray(value) for key, value in state.params.items()}
        assert float(metrics["optimizer/learning_rate"]) == pytest.approx(rate * 1e-2)
    for key, moved in found[1.0].items():
        assert_close(found[0.25][key], 0.75 * old[key] + 0.25 * moved, err_msg=key)


@pytest.fixture
def jumping(corpus, monkeypatch):
    """A run whose loss jumps at step 5, the first time it is taken, and what is done then."""

    def make(out, action, **changes):
        left = [AT]

        def update(watcher, step, values):
            return [event(left.pop())] if left == [step] else []

        monkeypatch.setattr(LossSpikes, "update", update)
        config = acting(loss_spike=action)
        return changed(config, {"data.source": str(corpus), "data.val_fraction": 0.0, "keep_last": 1, "out": str(out), **changes})

    return make


def saved(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


def rates(out):
    return [line["optimizer/learning_rate"] for line in lines_of(out / "metrics.jsonl") if "loss/train" in line]


def test_checkpoint_is_saved_and_kept(jumping, compile_cache, tmp_path):
    assert train(jumping(tmp_path / "run", "checkpoint")).finished
    assert saved(tmp_path / "run") == [AT + 1, STEPS]


def test_stop_saves_ends_and_goes_on(jumping, compile_cache, tmp_path):
    train(jumping(tmp_path / "plain", "warn"))
    config = jumping(tmp_path / "run", "stop")
    result = train(config)
    assert (result.step, result.finished, result.by_event) == (AT + 1, False, True) and saved(tmp_path / "run")[-1] == AT + 1
    result = train(changed(config, {"resume": True}))
    assert (result.step, result.finished, result.by_event) == (STEPS, True, False)
    assert different_arrays(last_state(tmp_path / "run")[0], last_state(tmp_path / "plain")[0]) == []


def test_lower_rate_lasts(jumping, compile_cache, tmp_path):
    train(jumping(tmp_path / "plain", "warn"))
    train(jumping(tmp_path / "run", "lower_rate"))
    share = np.array(rates(tmp_path / "run")) / rates(tmp_path / "plain")
    np.testing.assert_allclose(share, [1.0] * (AT + 1) + [0.5] * (STEPS - AT - 1))


@pytest.mark.parametrize("stop", usually([AT, AT + 1, AT + 2], AT + 1), ids=["at it", "after it", "later"])
def test_actions_are_the_same_in_a_run_that_was_stopped(stop, jumping, compile_cache, tmp_path, monkeypatch):
    """`stop` counts the batches. The one that lowers the rate without being asked for it any more goes on lowering it."""
    train(jumping(tmp_path / "whole", "lower_rate"))
    config = jumping(tmp_path / "run", "lower_rate")
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(stop))
        assert not train(config).finished
    train(changed(config, {"resume": True, "event": {} if stop > AT + 1 else config.event}))
    assert different_arrays(last_state(tmp_path / "run"), last_state(tmp_path / "whole")) == []
    for name in ("metrics.jsonl", "events.jsonl"):
        assert lines_of(tmp_path / "run" / name) == lines_of(tmp_path / "whole" / name), name


def test_rewind_goes_back_and_leaves_out_the_batches_since(jumping, compile_cache, tmp_path):
    assert train(jumping(tmp_path / "run", "rewind")).finished
    (line,) = lines_of(tmp_path / "run" / "events.jsonl")
    assert (
        line["kind"] == "rewind" and line["value"] == AT and "back to step 4, leaving out the 1 batches since" in line["message"]
    )
    assert last_state(tmp_path / "run")[1]["step"] == STEPS + 1


def test_a_rate_lowered_for_a_rewind_stays_lowered_by_the_next(jumping, compile_cache, tmp_path, monkeypatch):
    """The same step is taken three times, the second and third time with lower rates, from one and the same checkpoint on."""
    lower = EventConfig(action="lower_rate", factor=0.5)
    config = jumping(tmp_path / "run", "rewind")
    config = changed(config, {"event": {**config.event, "rewind": lower}, "optimizer.schedule": "constant"})
    left = [AT, AT]
    monkeypatch.setattr(LossSpikes, "update", lambda watcher, step, values: [event(left.pop())] if left[-1:] == [step] else [])
    assert train(config).finished
    lines = lines_of(tmp_path / "run" / "events.jsonl")
    assert [line["kind"] for line in lines] == ["rewind"] and "(rewind 2); from step 5 on the learning rate is 0.5" in lines[0][
        "message"
    ]
    top = rates(tmp_path / "run")[3]
    np.testing.assert_allclose(np.array(rates(tmp_path / "run")[3:]) / top, [1.0] + [0.25] * 8)


def test_a_run_that_no_longer_lowers_its_rate_goes_back_with_the_lower_one(jumping, compile_cache, tmp_path, monkeypatch):
    """Back beyond the step that lowered it, in a run resumed without that action: the step still takes a rate."""
    config = changed(jumping(tmp_path / "run", "lower_rate"), {"keep_last": 9})
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(7))
        assert not train(config).finished
    left = [8]
    monkeypatch.setattr(LossSpikes, "update", lambda watcher, step, values: [event(left.pop())] if left == [step] else [])
    assert train(changed(config, {"resume": True, "event": {"loss_spike": EventConfig(action="rewind")}})).finished
    (line,) = [line for line in lines_of(tmp_path / "run" / "events.jsonl") if line["kind"] == "rewind"]
    assert "back to step 4" in line["message"]
    assert rates(tmp_path / "run")[-1] == pytest.approx(0.5 * rates_of_schedule(config)[-1])


def rates_of_schedule(config):
    """The rate of each step where nothing lowers it."""
    schedule = make_schedule(config.optimizer, config.steps, config.optimizer.learning_rate)
    return [float(schedule(step)) for step in range(config.steps)]


@pytest.mark.parametrize("stops", [(), (6, 1)], ids=["at once", "stopped twice"])
def test_the_checkpoint_to_go_back_to_outlives_those_of_signals(stops, jumping, compile_cache, tmp_path, monkeypatch):
    """With room for one checkpoint only."""
    config = jumping(tmp_path / "run", "rewind")
    left = [8]
    monkeypatch.setattr(LossSpikes, "update", lambda watcher, step, values: [event(left.pop())] if left == [step] else [])
    for number, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            patch.setattr(DataIterator, "__next__", terminating(stop))
            assert not train(changed(config, {"resume": number > 0})).finished
    assert train(changed(config, {"resume": bool(stops)})).finished
    (line,) = lines_of(tmp_path / "run" / "events.jsonl")
    assert "back to step 4" in line["message"]


def test_rewinds_beyond_the_most_end_the_run(jumping, compile_cache, tmp_path, monkeypatch):
    config = jumping(tmp_path / "run", "rewind", **{"spike.max_rewinds": 1})
    monkeypatch.setattr(LossSpikes, "update", lambda watcher, step, values: [event(AT)] if step == AT else [])
    with pytest.raises(TrainingFailed, match=r"spike\.max_rewinds=1"):
        train(config)


def test_a_run_that_an_event_stopped_has_a_status_of_its_own(monkeypatch, tmp_path, capsys):
    from plait.launch import main

    monkeypatch.setattr("plait.train.loop.train", lambda config: Result(tmp_path, 6, False, {}, True))
    monkeypatch.setattr("plait.train.report.write_report", lambda runs: runs[0] / "report" / "index.html")
    assert main(["train", "lm_tiny", "--out", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().out
    assert "stopped by an event and saved at step 6; --resume goes on" in said
    assert str(tmp_path / "report") in said.replace("\n", "")

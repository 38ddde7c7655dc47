"""Fronts and effective speed-ups on numbers worked out by hand, and the costs of arms."""

import dataclasses
import json
import math

import pytest

from plait.configs import codec
from plait.configs.presets import preset
from plait.launch import main
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.sparse.dsa import DSAConfig
from plait.train.report.panels import costs
from plait.train.report.sweeps import _speed_up as shown
from plait.train.run_folder.lines import METRICS
from plait.train.sweep import fronts
from plait.train.sweep.arms import Arm, arms, baselines, estimate
from plait.train.sweep.better import better
from plait.train.sweep.record import SWEEP, Sweep
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims

STEPS = 100
CURVES = {
    (64, 0): {10: 4.0, 40: 3.0, 100: 2.5},
    (64, 1): {10: 4.2, 40: 3.2, 100: 2.4},
    (128, 0): {100: 2.75},
    (128, 1): {100: 2.3},
}
"""loss/val after steps, by width and seed."""


def changed(width: int, seed: int):
    config = preset("lm_tiny")
    channel_mixer = dataclasses.replace(config.model.channel_mixer, hidden_dim=2 * width)
    model = dataclasses.replace(config.model, d_model=width, channel_mixer=channel_mixer)
    data = dataclasses.replace(config.data, seed=seed)
    return dataclasses.replace(config, steps=STEPS, seed=seed, model=model, data=data)


@pytest.fixture
def folder(tmp_path):
    runs = []
    for (width, seed), curve in CURVES.items():
        overrides = {"model.d_model": width, "seed": seed, "data.seed": seed}
        run = Run(name=f"{width}-{seed}", overrides=overrides, config=changed(width, seed))
        runs.append(run)
        claims.claim(tmp_path, run).mkdir(parents=True)
        claims.run_folder(tmp_path, run).mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss/val": loss}) + "\n" for step, loss in curve.items()]
        (claims.run_folder(tmp_path, run) / METRICS).write_text("".join(lines))
        claims.write_outcome(tmp_path, run, claims.Outcome(status="done", metrics={"loss/val": curve[STEPS]}))
    sweep = Sweep(command=("lm_tiny",), since="today", commit=None, versions={}, runs=tuple(runs))
    (tmp_path / SWEEP).write_text(json.dumps(codec.encode(sweep)))
    return tmp_path, sweep


@pytest.mark.parametrize(
    ("sense", "kept"),
    [("lower", [0, 1, 4, 5]), ("higher", [0, 2, 6])],
)
def test_a_front_is_what_no_other_beats(sense, kept):
    points = [
        (1.0, 5.0),
        (2.0, 3.0),
        (2.0, 6.0),
        (3.0, 4.0),
        (4.0, 2.0),
        (4.0, 2.0),
        (5.0, 9.0),
        (6.0, 8.0),
        (7.0, 2.0),
        (7.0, 9.0),
    ]
    assert fronts.front(points, sense) == kept
    sign = 1 if sense == "lower" else -1
    beaten = lambda a, b: b[0] <= a[0] and sign * b[1] <= sign * a[1] and b != a
    assert sorted(kept) == [i for i, one in enumerate(points) if not any(beaten(one, other) for other in points)]


def test_the_way_of_a_metric_follows_from_its_name():
    lower = [
        "loss/val",
        "loss/bits_per_byte",
        "task/mqar/loss",
        "task/backcopy/copy_loss",
        "task/flip_flop/glitch_rate",
        "position/4",
    ]
    assert {better(name) for name in lower} == {"lower"}
    assert {better(name) for name in ("task/mqar/accuracy", "task/needle/found", "attn/entropy_ratio")} == {"higher"}


def test_speed_up_is_the_steps_that_the_baseline_needs(folder):
    """Seed 0 ends at 2.75, which the baseline passes between steps 40 and 100, half of the way of the loss: after sqrt(4000) steps. Seed 1 ends
    lower than the baseline ever is, and its 100 steps are counted."""
    found = arms(*folder, [], "loss/val")
    base = baselines(found, "model.d_model=64")[1]
    small, large = (fronts.step_flops(changed(width, 0)) for width in (64, 128))
    one = fronts.speed_up(folder[0], found[1], base, "loss/val", "lower")
    each = [math.log(math.sqrt(4000) * small / (STEPS * large)), math.log(small / large)]
    assert one.at_least and one.worse and not one.at_most, "2.525 in the mean, and the baseline 2.45"
    assert one.factor.count == 2 and one.factor.mean == pytest.approx(sum(each) / 2)
    itself = fronts.speed_up(folder[0], base, base, "loss/val", "lower")
    assert not itself.at_least and itself.factor.mean == pytest.approx(0)
    nothing = fronts.speed_up(folder[0], found[1], base, "loss/other", "lower")
    assert nothing.factor.count == 0


def test_speed_up_of_what_was_so_good_at_first_and_of_scores(folder):
    """It counts as no better before the first that was logged; of an accuracy more is better."""
    run = next(run for run in folder[1].runs if run.name == "64-0")
    assert fronts._needed(folder[0], run, "loss/val", 5.0, "lower") == (10.0, True, True)
    assert fronts._needed(folder[0], run, "loss/val", 4.0, "higher") == (10.0, True, False)
    assert fronts._needed(folder[0], run, "loss/val", 5.0, "higher") == (100.0, False, False)


def test_costs_are_those_of_the_model():
    """Of a two-layer model with one layer of softmax: its keys and values, and what the other keeps whatever the length."""
    config = changed(64, 0)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=2 * config.data.seq_len))
    model = fronts.settled(config).model
    kept = [sum(one.state_bytes(64, n, model.compute_dtype) for one in model.layer_mixers) for n in (config.data.seq_len, 1)]
    assert fronts.state(config) == pytest.approx(kept[0]) and fronts.state(longer) > fronts.state(config) > kept[1]
    assert fronts.flops(config) == STEPS * fronts.step_flops(config)
    assert fronts.params(changed(128, 0)) > fronts.params(config)
    attends = lambda **options: dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mixers={**config.model.mixers, "softmax": SoftmaxConfig(num_heads=2, **options)}),
    )
    assert fronts.density(attends()) == 1, "the linear layer has none"
    seen = sum(min(i + 1, 8) for i in range(config.data.seq_len)) / sum(i + 1 for i in range(config.data.seq_len))
    assert fronts.density(attends(window_size=8)) == pytest.approx(seen)
    latents = lambda mixer: dataclasses.replace(
        config, model=dataclasses.replace(config.model, pattern=mixer.name, mixers={mixer.name: mixer})
    )
    assert fronts.density(latents(MLAConfig(num_heads=2))) == 1, "heads of several widths"
    assert fronts.density(latents(DSAConfig(num_heads=2, top_k=4, index_heads=1))) > 0


def test_the_page_shows_both(folder, capsys):
    assert not main(["report", str(folder[0]), "--baseline", "model.d-model=64", "--better", "higher"])
    page = (folder[0] / "report" / "index.html").read_text()
    assert "effective speed-up" in page and (folder[0] / "report" / "cost.png").exists()
    assert "higher is better, and no arm on it is beaten" in page
    assert main(["report", str(folder[0] / "runs" / "64-0"), "--better", "higher"]) == 2
    assert "better='higher' is for the folder of a sweep" in capsys.readouterr().err


def test_a_factor_says_what_it_is():
    logs = estimate([math.log(2), math.log(2)])
    assert shown(fronts.SpeedUp(logs, False)) == ("2.00×", " 2.00 to 2.00")
    assert shown(fronts.SpeedUp(logs, True)) == "> 2.00×" and shown(fronts.SpeedUp(logs, False, True)) == "< 2.00×"
    assert shown(fronts.SpeedUp(logs, True, worse=True)) == ("–", " worse in the mean, better in some seeds")
    assert shown(fronts.SpeedUp(logs, True, True))[0] == "–"
    assert shown(fronts.SpeedUp(estimate([0.0]), False)) == "1.00×" and shown(fronts.SpeedUp(estimate([]), False)) == "–"


def test_arms_are_named_by_what_sets_them_apart():
    """In pictures, which have no room for every key of an arm."""
    arm = lambda **keys: Arm({f"model.{key}": value for key, value in keys.items()}, {}, {})
    several = [arm(gate=None, decay=0.1), arm(gate="headwise", decay=0.1), arm(gate=None, decay=0.5), arm(decay=0.1)]
    assert costs.names_of(several) == ["as most are", "gate=headwise", "decay=0.5", "as most are"]
    assert costs.names_of([arm(gate="a"), arm(gate="b")]) == ["a", "b"]
    assert costs.names_of([arm(gate="a", decay=0.1), arm(gate="b", decay=0.2)]) == ["gate=a, decay=0.1", "gate=b, decay=0.2"]

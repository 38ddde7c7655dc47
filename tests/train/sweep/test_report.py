"""The page of a sweep, on numbers worked out by hand."""

import dataclasses
import json
import math

import pytest

from plait.configs import codec
from plait.configs.presets import preset
from plait.launch import main
from plait.train.report import sweeps
from plait.train.report.panels import costs
from plait.train.report.sweeps import write_sweep
from plait.train.report.winner import opening
from plait.train.run_folder.lines import METRICS
from plait.train.sweep.arms import RATE, Arm, arms, baselines, difference, estimate, sensitivities
from plait.train.sweep.record import SWEEP, Sweep
from plait.train.sweep.runs import Run, SweepError, resolved
from plait.train.sweep.table import follows, varying
from plait.train.sweep.workers import claims

LOSSES = {(1e-3, 0): 2.0, (1e-3, 1): 2.2, (1e-3, 2): 2.4, (1e-2, 0): 1.9, (1e-2, 1): 2.0, (1e-2, 2): 2.4, (1e-1, 0): 9.0}
"""By learning rate and seed; seed 1 of the last diverged, seed 2 of it was not begun."""
START = 4.0


@pytest.fixture
def folder(tmp_path):
    config = preset("lm_tiny")
    runs = []
    for rate in (1e-3, 1e-2, 1e-1):
        for seed in (0, 1, 2):
            changed = dataclasses.replace(
                config,
                seed=seed,
                data=dataclasses.replace(config.data, seed=seed),
                optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
            )
            overrides = {RATE: rate, "seed": seed, "data.seed": seed}
            run = Run(name=f"{rate}-{seed}", overrides=overrides, config=changed)
            runs.append(run)
            if rate == 1e-1 and seed == 2:
                continue
            claims.claim(tmp_path, run).mkdir(parents=True)
            claims.run_folder(tmp_path, run).mkdir(parents=True)
            lost = (rate, seed) not in LOSSES
            lines = [{"step": 1, "loss/train": START}, {"step": 9, "loss/train": None if lost else 2.0, "attn/sink_rate": 0.5}]
            (claims.run_folder(tmp_path, run) / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
            if lost:
                ended = claims.Outcome(status="failed", error="too many <b> non-finite steps", failures=1)
            else:
                ended = claims.Outcome(status="done", metrics={"loss/val": LOSSES[rate, seed]})
            claims.write_outcome(tmp_path, run, ended)
    sweep = Sweep(command=("lm_tiny",), since="today", commit=None, versions={}, runs=tuple(runs))
    (tmp_path / SWEEP).write_text(json.dumps(codec.encode(sweep)))
    return tmp_path, sweep


def test_intervals_and_paired_differences(folder):
    found = arms(*folder, [], "loss/val")
    assert [(arm.keys[RATE], len(arm.values), len(arm.runs)) for arm in found] == [(1e-3, 3, 3), (1e-2, 3, 3), (1e-1, 1, 3)]
    # 2.0, 2.2, 2.4: mean 2.2, deviation 0.2, t(0.975, 2) = 4.302653
    assert found[0].estimate.mean == pytest.approx(2.2) and found[0].estimate.half == pytest.approx(4.302653 * 0.2 / 3**0.5)
    assert found[2].estimate.mean == 9.0 and math.isnan(found[2].estimate.half)
    first = baselines(found, f"{RATE}=0.001")
    assert all(one is found[0] for one in first)
    apart = difference(found[1], found[0])  # -0.1, -0.2, 0: mean -0.1, deviation 0.1
    assert (apart.mean, apart.half, apart.count) == pytest.approx((-0.1, 4.302653 * 0.1 / 3**0.5, 3))
    assert difference(found[2], found[0]).count == 1 and estimate([]).count == 0


def test_sensitivity_counts_what_diverged_as_the_start(folder):
    (found,) = sensitivities(folder[0], arms(*folder, [], "loss/val"))
    # seed 0: (2.0 + 1.9 + 4) / 3 - 1.9; seed 1: (2.2 + 2.0 + 4) / 3 - 2.0; seed 2 lacks a learning rate
    each = (7.9 / 3 - 1.9, 8.2 / 3 - 2.0)
    assert (found.start, found.rates, found.over_seeds.count) == (START, 3, 2)
    assert found.over_seeds.mean == pytest.approx(sum(each) / 2)


def test_the_page_holds_all_runs(folder):
    path = write_sweep(folder[0], baseline=f"{RATE}=0.001")
    page = path.read_text()
    assert path == folder[0] / "report" / "index.html" and {"metric.png", "loss.png", "attention.png"} <= {
        one.name for one in path.parent.iterdir()
    }
    for text in ("−0.1000", "1 of 3", "single seed", "queued", "too many &lt;b&gt; non-finite", "7 of 9 runs are over"):
        assert text in page, text
    assert "http://" not in page and "https://" not in page


def test_the_page_opens_with_the_best_arm_in_pairs_of_seeds(folder):
    """Its means 2.1 and 2.2 differ by -0.1, -0.2 and 0 in pairs: by less than their interval of 0.248. One more of -0.3 apart: beyond."""
    path, sweep = folder
    told = opening(path, sweep, arms(path, sweep, [], "loss/val"), "loss/val", "lower")
    for text in (
        "No arm has the lowest validation loss beyond the noise: learning_rate = 0.01, 2.100 in the mean, is 0.100 below "
        "learning_rate = 0.001, with a 95% interval of ±0.248 over 3 pairs of seeds. The last, learning_rate = 0.1, is 6.900 above it.",
        "Which documents are held out differs between the seeds",
    ):
        assert text in told, told
    assert "Edge" not in told and "Measured on" not in told
    for run in sweep.runs:
        facts = {"validation": {"batches": 2, "of": 638, "rows": 16, "row_tokens": 64}}
        claims.run_folder(path, run).mkdir(parents=True, exist_ok=True)
        (claims.run_folder(path, run) / "environment.json").write_text(json.dumps(facts))
        if run.name == "0.01-2":
            claims.write_outcome(path, run, claims.Outcome(status="done", metrics={"loss/val": 2.25}))
    told = opening(path, sweep, arms(path, sweep, [], "loss/val")[:2], "loss/val", "lower")
    assert "Learning_rate = 0.01 has the lowest validation loss, 2.050 in the mean, 0.150 below the next" in told
    assert "Measured on 1,024 tokens (2 of 638 batches, 16 rows of 64)." in told
    assert "learning_rate = 0.01 of the best arm is the largest that was tried (0.001, 0.01); a larger one may be better" in told
    page = write_sweep(path).read_text()
    assert page.index("<td>0.01</td>") < page.index("<td>0.001</td>") < page.index("<td>0.1</td>"), "the best first"
    assert "--baseline optimizer.learning_rate=0.001" in page and "−0.1500" not in page and "+0.1500" in page


def test_a_key_that_follows_another_is_left_out_unless_named(folder):
    path, sweep = folder
    beside = {1e-3: 16, 1e-2: 32, 1e-1: 64}
    runs = []
    for run in sweep.runs:
        model = dataclasses.replace(run.config.model, d_model=beside[run.overrides[RATE]])
        overrides = {"model.d_model": model.d_model, **run.overrides}
        runs.append(dataclasses.replace(run, overrides=overrides, config=dataclasses.replace(run.config, model=model)))
    sweep = dataclasses.replace(sweep, runs=tuple(runs))
    assert list(arms(path, sweep, [], "loss/val")[0].keys) == [RATE]
    assert list(arms(path, sweep, ["model.d_model"], "loss/val")[0].keys) == ["model.d_model"]
    assert list(arms(path, sweep, [], "loss/val", ["model.d_model"])[0].keys) == [RATE, "model.d_model"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"by": ["optimizer.learning_rat"]},
            "'optimizer.learning_rat' does not vary in this sweep; did you mean 'optimizer.learning_rate'",
        ),
        ({"by": ["seed"]}, "'seed' is a seed, and runs that differ in seeds alone are one arm"),
        ({"by": ["steps"]}, "'steps' does not vary in this sweep; there are optimizer.learning_rate"),
        ({"metric": "loss/vall"}, "metric='loss/vall' is of no run that is over; did you mean 'loss/val'"),
        ({"metric": "val_loss"}, "metric='val_loss' is of no run that is over; did you mean 'loss/val'"),
        ({"baseline": "steps=1"}, "'steps' does not vary"),
        ({"baseline": f"{RATE}=7"}, "is never '7'; it is 0.001, 0.01, 0.1"),
    ],
)
def test_bad_options(folder, options, said):
    with pytest.raises(SweepError) as error:
        write_sweep(folder[0], **options)
    assert said in str(error.value)


def test_a_sweep_without_results(folder):
    for run in folder[1].runs:
        (claims.claim(folder[0], run) / "outcome.json").unlink(missing_ok=True)
    with pytest.raises(SweepError, match="has no run that is over"):
        write_sweep(folder[0])


def test_the_command(folder, capsys):
    assert not main(["report", str(folder[0]), "--by", "optimizer.learning-rate", "--baseline", "optimizer.learning-rate=1e-3"])
    assert main(["report", str(folder[0]), "--baseline", "steps"]) == 2 and "must be KEY=VALUE" in capsys.readouterr().err
    assert main(["report", str(folder[0]), str(folder[0])]) == 2 and "a page of its own" in capsys.readouterr().err
    assert main(["report", str(folder[0] / "runs" / "0.001-0"), "--metric", "loss/val"]) == 2
    assert "is for the folder of a sweep" in capsys.readouterr().err


def test_an_option_that_follows_from_the_pattern_is_no_key_of_its_own():
    heads = "model.mixers.{}.num_heads".format
    rows = (
        {"model.pattern": "softmax", heads("softmax"): 1},
        {"model.pattern": "softmax,gla", heads("softmax"): 1, heads("gla"): 2, RATE: 2e-3},
        {"model.pattern": "gla", heads("gla"): 2, RATE: 2e-3},
        {"model.pattern": "retnet", heads("retnet"): 1},
        {"model.pattern": "retnet", heads("retnet"): 2},
    )
    varied = varying(resolved("lm_tiny", rows))
    told = {key: follows(key, "model.pattern", varied) for key in next(iter(varied.values()))}
    assert told[heads("softmax")] and told[heads("gla")]
    assert not told[heads("retnet")], "it varies beside the pattern"
    assert not told[RATE], "every run has one, and another pattern could have had it"
    numbers = {name: {"a": number, "b": None if number else 1} for number, name in enumerate(varied)}
    assert not follows("b", "a", numbers), "each trial of a search has a rate of its own, from which nothing follows"


@pytest.mark.parametrize(
    ("arms", "names", "lying"),
    [
        ([{"a": "gla"}, {"a": "softmax"}], ["gla", "softmax"], False),
        ([{"a": n, "b": m} for n in "xy" for m in (1, 2)], ["x", "y"], False),
        (
            [{"a": f"gated_deltanet*{n},softmax"} for n in range(1, 12)],
            [f"gated_deltanet*{n},softmax" for n in range(1, 12)],
            True,
        ),
        ([{"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 2}], ["as most are", "a=1", "b=2"], True),
    ],
    ids=["short", "grid", "long", "one change each"],
)
def test_arms_stand_one_below_the_other_where_names_are_long_or_no_grid(arms, names, lying, monkeypatch):
    monkeypatch.setattr(sweeps, "picture", lambda name, figure, caption: figure)
    ax = sweeps._by_key([Arm(keys, {}, {(0,): 0.5}) for keys in arms], "accuracy", asked=False).axes[0]
    labels = ax.get_yticklabels() if lying else ax.get_xticklabels()
    assert [label.get_text() for label in labels] == names
    assert (ax.get_xlabel() if lying else ax.get_ylabel()) == "accuracy"


def test_arms_at_one_point_of_the_front_are_named_once():
    points = [(1.0, 0.9), (2.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    assert costs._apart([0, 1, 2], points) == [0, 1]

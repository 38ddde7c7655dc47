"""Early stopping: the rules as they are stated, and runs that end by them."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from plait.configs.components import ConfigError
from plait.tests.train.sweep.common import SMALL
from plait.train.pods.hosts.supervise import DONE
from plait.train.report.sweeps import write_sweep
from plait.train.sweep import show
from plait.train.sweep.asked import asked_for
from plait.train.sweep.record import SweepError, begun
from plait.train.sweep.stopping import Judge, past_best, past_median
from plait.train.sweep.table import CSV
from plait.train.sweep.workers import claims, worker


def looked_at(folder, corpus, *words):
    """A small sweep that validates every other step."""
    kept = [word for word in SMALL if not word.startswith("--eval-every")]
    words = [*kept, "--data.source", str(corpus), "--steps", "8", "--eval-every", "2", *words]
    return begun(folder, asked_for("lm_tiny", words, folder).sweep)


RATES = ["--optimizer.learning-rate", "1e-2,1e-3,1e-6,1e-7", "--checkpoint-every", "2"]


def test_the_median_is_of_means_of_runs_that_are_done():
    others = [[4.0, 2.0], [6.0, 4.0], [8.0, 6.0]]  # means 3, 5, 7
    assert past_median([9.0, 5.0], others, 3) is None, "its best is the median"
    assert past_median([9.0, 5.1], others, 3) == 5.0
    assert past_median([4.9, 9.0], others, 3) is None, "what was best counts"
    assert past_median([9.0], others[:2], 3) is None and past_median([9.0], [*others[:2], []], 3) is None, "too few"
    assert past_median([math.inf], others[:2], 1) == 4.0


def test_the_best_of_a_rung_go_on():
    assert past_best(5.0, [], 3) is None, "the first to come"
    assert past_best(5.0, [4.0], 3) == 4.0 and past_best(3.0, [4.0], 3) is None
    assert past_best(2.0, [1.0, 3, 4, 5, 6], 3) is None and past_best(3.5, [1.0, 3, 4, 5, 6], 3) == 3.0
    assert past_best(math.inf, [1.0, 2.0], 2) == 1.0


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_halving_is_optunas(factor):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    draw = np.random.default_rng(factor)
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor),
    )
    rungs: dict[int, list[float]] = {}
    ends = []
    for _ in range(40):
        trial = study.ask()
        for step in (factor**rung for rung in range(4)):
            value = float(draw.integers(30))
            trial.report(value, step)
            mine = past_best(value, rungs.get(step, []), factor)
            rungs.setdefault(step, []).append(value)
            assert trial.should_prune() == (mine is not None), (step, value)
            if mine is not None:
                break
        ends.append(mine is None)
        study.tell(trial, value if mine is None else None, state=optuna.trial.TrialState(1 if mine is None else 2))
    assert any(ends) and not all(ends)


def test_runs_are_ended_kept_apart_and_stay_so(tmp_path, corpus, compile_cache, monkeypatch):
    sweep = looked_at(tmp_path, corpus, *RATES, "--stop.rule", "median", "--stop.first", "2", "--stop.least", "2")
    bad, worst = sweep.runs[2:]
    assert worker.work(tmp_path) == DONE
    assert [claims.status(tmp_path, run) for run in sweep.runs] == ["done", "done", "pruned", "pruned"]
    ended = claims.outcome(tmp_path, bad)
    assert ended.step == 2 and ended.error is None and ended.failures == 0
    assert ended.why.startswith("at step 2: loss/val 5.") and ended.why.endswith("the median of 2")
    table, over = show.status_table(tmp_path, sweep)
    assert over and "2 done" in table.title and "2 pruned" in table.title
    assert f"runs 3, 4 pruned: {ended.why}" in table.caption.plain.splitlines()
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / CSV).open())}
    assert (rows[bad.name]["status"], rows[bad.name]["why"], rows[bad.name]["error"]) == ("pruned", ended.why, "")
    page = write_sweep(tmp_path).read_text()
    assert "pruned" in page and "at step 2: loss/val" in page and "0 of 1" in page, "its loss is no result"

    # what was decided stays, also where the worker was killed before it could say so
    (claims.claim(tmp_path, bad) / "outcome.json").unlink()
    (claims.claim(tmp_path, worst) / "outcome.json").unlink()
    (claims.claim(tmp_path, worst) / "compared.json").unlink()
    assert Judge(tmp_path, sweep, bad).told == ended.why and Judge(tmp_path, sweep, worst).told is None
    trained = []
    monkeypatch.setattr(
        worker, "train", lambda config, judge, of=worker.train: (trained.append(config.out), of(config, judge))[1]
    )
    assert worker.work(tmp_path) == DONE
    assert claims.outcome(tmp_path, bad).why == ended.why
    assert trained == [str(claims.run_folder(tmp_path, worst))] and claims.status(tmp_path, worst) == "pruned"
    with pytest.raises(SweepError, match=r'ends runs by another rule: stop\.rule: "median" -> null'):
        begun(tmp_path, dataclasses.replace(sweep, stop=dataclasses.replace(sweep.stop, rule=None)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--stop.first", "3"],
            r"stop.metric='loss/val' is told every 2 steps, and not at 3 \(eval_every=2\); set eval_every to a div",
        ),
        (["--stop.first", "8"], "stop.first=8 is not before the last of steps=8"),
        (["--stop.fist", "2"], "did you mean --stop.first"),
        (["--stop.factor", "1"], "stop.factor=1 must be a whole number from 2"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(tmp_path, corpus, words, said):
    with pytest.raises(ValueError, match=said):
        looked_at(tmp_path / "sweep", corpus, "--stop.rule", "halving", *words)
    assert not (tmp_path / "sweep").exists()


def test_a_metric_that_no_run_tells_fails_with_those_there_are(tmp_path, corpus):
    (run,) = (sweep := looked_at(tmp_path, corpus, "--stop.rule", "halving", "--stop.first", "2")).runs
    sweep = dataclasses.replace(sweep, stop=dataclasses.replace(sweep.stop, metric="task/x"))
    with pytest.raises(ConfigError, match=r"stop.metric='task/x' is not told by this run at step 2; it tells loss/val"):
        Judge(tmp_path, sweep, run)(2, {"loss/val": 1.0, "grad/norm": 2.0})

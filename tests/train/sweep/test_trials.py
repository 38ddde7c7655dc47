"""Searches: proposals are the sampler's, made by any worker from the folder alone, and each is trained with all seeds."""

import concurrent.futures
import csv
import json
import shutil

import pytest

from plait.configs.sweeps.search import Between, placed, ranges
from plait.tests.train.sweep.common import SMALL, small
from plait.train.pods.hosts.supervise import DONE
from plait.train.sweep import show, trials
from plait.train.sweep.asked import asked_for
from plait.train.sweep.record import SweepError, begun, read
from plait.train.sweep.table import CSV
from plait.train.sweep.workers import claims, worker
from plait.train.sweep.workers.claims import Outcome

optuna = pytest.importorskip("optuna")
SPACE = ["--optimizer.learning-rate", "1e-4..1e-1:log", "--data.batch-size", "2..6", "--model.tie-embeddings", "True,False"]


def searching(folder, corpus, *words, trials=12):
    return small(folder, corpus, "--search.sampler", "tpe", "--search.trials", str(trials), "--steps", "2", *words)


def ended(folder, run, **fields):
    claims.claim(folder, run).mkdir(parents=True)
    claims.write_outcome(folder, run, Outcome(step=2, **fields))


def test_values_of_a_space():
    found, rest = ranges(["--a.b-c=1..8", "--x", "1e-4..0.1:log", "--seed", "0,1", "--flag", "--y", "..", "--z", "a..b"])
    assert found == {"a.b_c": Between(1, 8), "x": Between(1e-4, 0.1, log=True)}
    assert rest == ["--seed", "0,1", "--flag", "--y", "..", "--z", "a..b"]
    assert placed({"m[1]": "gla", "k": 3, "m[0]": "softmax", "m[10]": "x"}) == {"k": 3, "m": "softmax,gla,x"}


def test_options_of_a_mixer_are_of_trials_whose_pattern_has_it():
    options = {"model.mixers.gla.num_heads": 2, "model.mixers.softmax.positions.theta": 100.0}
    parts = lambda second: {"model.pattern[0]": "softmax", "model.pattern[1]": second}
    assert placed({**options, **parts("gla")}) == {**options, "model.pattern": "softmax,gla"}
    assert placed({**options, **parts("softmax")}) == {
        "model.mixers.softmax.positions.theta": 100.0,
        "model.pattern": "softmax,softmax",
    }
    assert placed({**options, "model.pattern": "gla"}) == {**options, "model.pattern": "gla"}  # nothing is searched by place


def test_proposals_are_those_of_a_sampler_that_saw_all_trials(tmp_path, corpus):
    sweep = searching(tmp_path, corpus, *SPACE, "--seeds", "2")
    distributions = {
        "model.tie_embeddings": optuna.distributions.CategoricalDistribution((0, 1)),
        "optimizer.learning_rate": optuna.distributions.FloatDistribution(1e-4, 0.1, log=True),
        "data.batch_size": optuna.distributions.IntDistribution(2, 6),
    }
    distributions = {key: distributions[key] for key in sweep.search.space}  # a sampler draws in this order
    for number in range(sweep.search.options.trials):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=number, constant_liar=True))
        for one in trials.trials(tmp_path):
            params = {**one.values, "model.tie_embeddings": int(not one.values["model.tie_embeddings"])}
            state = optuna.trial.TrialState(1 if one.number % 4 != 3 else 0)
            loss = -2.0 * one.number if state.is_finished() else None
            study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=distributions, value=loss))
        wanted = study.ask(distributions).params
        assert trials.propose(tmp_path, sweep.search)
        last = trials.trials(tmp_path)[-1]
        assert last.number == number and last.values["optimizer.learning_rate"] == float(
            f"{wanted['optimizer.learning_rate']:.4g}"
        )
        assert last.values["data.batch_size"] == wanted["data.batch_size"]
        assert last.values["model.tie_embeddings"] is not bool(wanted["model.tie_embeddings"])
        assert [run.config.seed for run in last.runs] == [run.config.data.seed for run in last.runs] == [0, 1], "paired"
        for seed, run in enumerate(last.runs):
            if number % 4 != 3:  # these stay as running ones
                ended(tmp_path, run, status="done", metrics={"loss/val": -2.0 * number + (1.0 if seed else -1.0)})
    assert not trials.propose(tmp_path, sweep.search), "all there are to be"
    assert read(tmp_path).planned == len(read(tmp_path).runs) == 24


def test_workers_that_propose_at_once_propose_different_trials(tmp_path, corpus):
    sweep = searching(tmp_path, corpus, *SPACE)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: trials.propose(tmp_path, sweep.search), range(14))) == 12
    found = trials.trials(tmp_path)
    assert [one.number for one in found] == list(range(12)) and len({json.dumps(dict(one.values)) for one in found}) == 12


@pytest.mark.slow
def test_a_search_is_trained_to_its_end_and_goes_on_where_it_was(tmp_path, corpus, compile_cache):
    words = ["--optimizer.weight-decay", "0.0,0.1", "--seeds", "2", "--search.sampler", "random"]
    kept = [*SMALL, "--data.source", str(corpus), "--steps", "2"]
    asked = asked_for("lm_tiny", [*kept, *words, "--search.trials", "4"], tmp_path)
    sweep = begun(tmp_path, asked.sweep)
    trials.propose(tmp_path, sweep.search)
    worker_found = trials.trials(tmp_path)
    assert worker.work(tmp_path) == DONE and trials.trials(tmp_path)[:1] == worker_found, "what was proposed is trained"
    sweep = read(tmp_path)
    assert len(trials.trials(tmp_path)) == 4 and len(sweep.runs) == 4, "two values of two seeds: equal trials are trained once"
    assert {claims.status(tmp_path, run) for run in sweep.runs} == {"done"}
    rows = list(csv.DictReader((tmp_path / CSV).open()))
    assert {row["optimizer.weight_decay"] for row in rows} == {"0.0", "0.1"}
    assert show.status_table(tmp_path, sweep)[1]
    assert trials.value(tmp_path, trials.trials(tmp_path)[0], "loss/val") == pytest.approx(
        sum(claims.outcome(tmp_path, run).metrics["loss/val"] for run in sweep.runs[:2]) / 2
    )
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "claims").glob("*/outcome.json"))
    assert worker.work(tmp_path) == DONE and begun(tmp_path, asked.sweep).runs == sweep.runs
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "claims").glob("*/outcome.json")) == before
    other = asked_for("lm_tiny", [*kept, *words, "--search.trials", "5"], tmp_path / "other").sweep
    with pytest.raises(SweepError, match=r"holds another search: search\.options\.trials: 4 -> 5"):
        begun(tmp_path, other)
    shutil.rmtree(tmp_path / "trials")
    assert "4 trials to be proposed" in show.status_table(tmp_path, read(tmp_path))[0].title


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "search.sampler='tpe' has nothing to search"),
        (["--optimizer.learning-rate", "1e-1..1e-3"], "0.1..0.001 must go from a number to a larger one"),
        (["--optimizer.weight-decay", "0.0..1.0:log"], "must be of numbers above 0; leave :log out"),
        (["--optimizer.learning-rate", "-1.0..1e-3", "--data.seq-len", "16,0"], "(?s)2 of 3 rows.*learning_rate=-1.0.*seq_len=0"),
        (["--search.trails", "3", "--seed", "0,1"], "did you mean --search.trials"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        asked_for("lm_tiny", ["--search.sampler", "tpe", *words], tmp_path / "sweep")


def test_a_range_without_a_search_says_how_to_search(tmp_path):
    with pytest.raises(
        SweepError, match=r"(?s)learning_rate=1e-4\.\.1e-1.*--optimizer\.learning-rate: a range is of a search; add --search"
    ):
        asked_for("lm_tiny", ["--optimizer.learning-rate", "1e-4..1e-1:log"], tmp_path)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SweepError, match=r"needs the package optuna, which is not installed; pip install 'plait\[search\]'"):
        asked_for("lm_tiny", ["--search.sampler", "tpe", "--seed", "0,1"], tmp_path)

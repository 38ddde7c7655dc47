"""A sweep's folder holds one sweep, whoever comes and when."""

import json
import threading

import pytest

from plait.tests.train.sweep.common import small
from plait.train.sweep import record
from plait.train.sweep.runs import SweepError
from plait.train.sweep.workers import claims


def test_of_many_that_begin_at_once_all_find_one_sweep(tmp_path, corpus):
    found = []
    threads = [threading.Thread(target=lambda: found.append(small(tmp_path, corpus, "--seed", "0,1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one == found[0] for one in found)
    saved = json.loads((tmp_path / record.SWEEP).read_text())
    assert saved["command"][0] == "lm_tiny" and len(saved["runs"]) == 2 and "jax" in saved["versions"] and "commit" in saved
    if str(saved["commit"]).endswith("-dirty"):
        assert (tmp_path / record.CHANGES).read_text().startswith("diff --git")


def test_another_command_is_refused_with_the_difference(tmp_path, corpus):
    small(tmp_path, corpus, "--seed", "0,1")
    small(tmp_path, corpus, "--seed", "1,0")  # the same runs
    with pytest.raises(
        SweepError,
        match=r"holds another sweep, begun with 'lm_tiny .*' ?; use that command, one .* or another folder, as --out \S+-2\. It differs",
    ) as error:
        small(tmp_path, corpus, "--seed", "0,2")
    assert "asked for now and not there: " in str(error.value) and "seed=2" in str(error.value)
    assert "there and not asked for now: " in str(error.value) and "seed=1" in str(error.value)


def test_a_command_that_asks_for_more_adds_runs_and_keeps_those_there(tmp_path, corpus, caplog):
    first = small(tmp_path, corpus, "--seed", "0,1")
    claims.write_outcome(tmp_path, first.runs[0], claims.Outcome(status="done"))
    begun = (tmp_path / record.SWEEP).read_bytes()
    rate = first.runs[0].config.optimizer.learning_rate
    rates = ["--optimizer.learning-rate", f"{rate},{3 * rate}"]
    with caplog.at_level("INFO", "plait"):
        more = small(tmp_path, corpus, "--seed", "2,1,0", *rates)
    assert more.runs[:2] == first.runs, "under their names"
    assert len(more.runs) == 6 == len({run.content for run in more.runs})
    assert [claims.status(tmp_path, run) for run in more.runs] == ["done", *["queued"] * 5]
    assert (tmp_path / record.SWEEP).read_bytes() == begun, "by which workers know their sweep"
    assert record.read(tmp_path) == more and more.latest.command[-1] == rates[1] and "2 runs there, 4 more now" in caplog.text

    assert small(tmp_path, corpus, "--seed", "0,1") == more, "nothing is taken away"
    most = small(tmp_path, corpus, "--seed", "2,1,0,3", *rates)
    assert most.runs[:6] == more.runs and len(most.runs) == 8 and len(most.grown) == 2
    with caplog.at_level("INFO", "plait"):
        assert small(tmp_path, corpus, "--seed", "0,2") == most, "nothing is taken away"
    assert "8 runs there, of which the 2 that are asked for now are trained" in caplog.text
    for words in (["--seed", "0,5"], ["--seed", "0,1,2,3,4"], ["--seed", "0,1,2,3,4", *rates, "--steps", "9"]):
        with pytest.raises(SweepError, match=r"(?s)holds another sweep, begun with 'lm_tiny .*--seed 2,1,0,3 .*It differs in:"):
            small(tmp_path, corpus, *words)
    with pytest.raises(SweepError, match="ends runs by another rule"):
        small(
            tmp_path,
            corpus,
            "--seed",
            "0,1,2,3,4",
            *rates,
            "--stop.rule",
            "median",
            "--stop.first",
            "2",
            "--stop.metric",
            "loss/train",
        )
    (tmp_path / record.SWEEP).unlink()
    assert small(tmp_path, corpus, "--seed", "0,1").runs == most.runs, "the runs that were added are not another sweep's"


def test_of_many_that_add_runs_at_once_all_find_one_sweep(tmp_path, corpus):
    small(tmp_path, corpus, "--seed", "0,1")
    found = []
    add = lambda: found.append(small(tmp_path, corpus, "--seed", "0,1,2"))
    threads = [threading.Thread(target=add) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 4 and all(one == found[0] for one in found) and len(found[0].grown) == 1


def test_a_preset_that_changed_under_a_sweep_is_refused(tmp_path, corpus):
    small(tmp_path, corpus, "--seed", "0,1")
    saved = json.loads((tmp_path / record.SWEEP).read_text())
    saved["runs"][1]["config"]["optimizer"]["b1"] = 0.5
    (tmp_path / record.SWEEP).write_text(json.dumps(saved))
    with pytest.raises(SweepError, match=r"seed=1.*: optimizer\.b1: 0\.5 -> 0\.9"):
        small(tmp_path, corpus, "--seed", "0,1")


def test_other_code_is_said(tmp_path, corpus, caplog):
    small(tmp_path, corpus)
    saved = json.loads((tmp_path / record.SWEEP).read_text())
    (tmp_path / record.SWEEP).write_text(json.dumps({**saved, "versions": {**saved["versions"], "jax": "0.1"}}))
    small(tmp_path, corpus)
    assert 'was begun with other code: jax: "0.1" -> ' in caplog.text


def test_a_folder_that_is_none(tmp_path, corpus):
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match="is a file; give a folder"):
        small(tmp_path / "file", corpus)


def test_what_is_left_of_another_sweep_is_not_taken_over(tmp_path, corpus):
    """Its table would be overwritten; the command that began it puts its `sweep.json` back."""
    sweep = small(tmp_path, corpus, "--seed", "0,1")
    claims.write_outcome(tmp_path, sweep.runs[0], claims.Outcome(status="done"))
    (tmp_path / record.SWEEP).unlink()
    with pytest.raises(
        SweepError, match=r"holds no sweep\.json and 1 runs of another sweep, as seed=0-.*; restore that file, use"
    ):
        small(tmp_path, corpus, "--seed", "2,3")
    assert not (tmp_path / record.SWEEP).exists()
    assert small(tmp_path, corpus, "--seed", "0,1").runs == sweep.runs


def test_a_damaged_outcome_says_what_to_do(tmp_path, corpus):
    (run,) = small(tmp_path, corpus).runs
    path = claims.claim(tmp_path, run) / claims.OUTCOME
    path.parent.mkdir(parents=True)
    path.write_text('{"status": "do')
    with pytest.raises(SweepError, match=r"outcome\.json is not JSON .*; or delete it: the same command then goes on"):
        claims.status(tmp_path, run)
    path.unlink()
    assert claims.status(tmp_path, run) == "queued"

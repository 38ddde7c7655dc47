"""Workers: each run is trained once, by one, and fails alone."""

import csv
import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from plait.launch import main
from plait.tests.train.sweep.common import SMALL, small
from plait.train.loop import Result
from plait.train.pods.hosts.supervise import DONE, FAILED
from plait.train.run_folder import owner
from plait.train.run_folder.lines import read_metrics
from plait.train.run_folder.owner import owned
from plait.train.sweep import show
from plait.train.sweep.record import read
from plait.train.sweep.table import CSV, PARQUET
from plait.train.sweep.workers import claims, worker
from plait.train.sweep.workers.worker import work
from plait.train.watching.actions import Actions
from plait.train.watching.watchers import Event


def standing(folder, sweep):
    return [claims.status(folder, run) for run in sweep.runs]


def test_runs_end_once_fail_alone_and_are_left_to_who_has_them(tmp_path, corpus, compile_cache, caplog):
    sweep = small(tmp_path, corpus, "--seed", "0,1,2", "--steps", "4")
    folders = [claims.run_folder(tmp_path, run) for run in sweep.runs]
    folders[1].parent.mkdir()
    folders[1].touch()  # where its folder cannot be made
    with owned(claims.claim(tmp_path, sweep.runs[2])):
        assert standing(tmp_path, sweep) == ["queued", "queued", "running"]
        assert work(tmp_path) == FAILED
        assert standing(tmp_path, sweep) == ["done", "failed", "running"]
    first = claims.outcome(tmp_path, sweep.runs[0])
    assert first.step == 4 and first.metrics["loss/val"] > 0 and first.failures == 0
    assert "is a file; give a folder" in claims.outcome(tmp_path, sweep.runs[1]).error
    assert standing(tmp_path, sweep)[2] == "queued" and not folders[2].exists()
    told = show.status_table(tmp_path, sweep)[0].caption.plain
    assert told.startswith("run 2 failed: ") and told.endswith("is a file; give a folder") and "\n" not in told

    folders[1].unlink()
    left = [folders[0] / "metrics.jsonl", claims.claim(tmp_path, sweep.runs[0]) / "outcome.json"]
    before = [path.stat().st_mtime_ns for path in left]
    assert work(tmp_path) == DONE
    assert standing(tmp_path, sweep) == ["done"] * 3 and claims.outcome(tmp_path, sweep.runs[1]).failures == 1
    assert [path.stat().st_mtime_ns for path in left] == before, "what is done is left as it is"
    assert work(tmp_path) == DONE
    for folder in folders:
        assert [line["step"] for line in read_metrics(folder) if "loss/train" in line] == [1, 2, 3, 4]
        assert not (folder / "data").exists(), "the tokens are those of the sweep"
    losses = [claims.outcome(tmp_path, run).metrics["loss/train"] for run in sweep.runs]
    assert len(set(losses)) == 3

    rows = list(csv.DictReader((tmp_path / CSV).open()))
    assert [row["seed"] for row in rows] == ["0", "1", "2"] and {row["status"] for row in rows} == {"done"}
    assert [float(row["loss/train"]) for row in rows] == losses and "steps" not in rows[0], "keys that differ"
    table = pq.read_table(tmp_path / PARQUET).to_pydict()
    assert table["seed"] == [0, 1, 2] and table["loss/train"] == losses and table["run"] == [run.name for run in sweep.runs]


def test_a_command_for_some_of_the_runs_trains_those(tmp_path, corpus, compile_cache, capsys):
    folder, words = tmp_path / "sweep", ["--seed", "0,1,2,3", "--steps", "2"]
    sweep = small(folder, corpus, *words)
    claims.write_outcome(folder, sweep.runs[0], claims.Outcome(status="failed", error="x", failures=1))
    claims.run_folder(folder, sweep.runs[3]).mkdir(parents=True)
    (claims.run_folder(folder, sweep.runs[3]) / "config.json").write_text("{}")
    before = ["failed", "queued", "queued", "interrupted"]
    assert standing(folder, sweep) == before
    few = ["sweep", "lm_tiny", *SMALL, "--data.source", str(corpus), "--seed", "1", "--steps", "2", "--out", str(folder)]
    assert main([*few, "--dry-run"]) == 0 and "1 run;" in capsys.readouterr().out
    assert main(few) == DONE
    assert standing(folder, sweep) == ["failed", "done", "queued", "interrupted"]
    assert f"{folder}: 1 done of 1 asked for, 3 others there; results: " in capsys.readouterr().out.replace("\n", "")
    assert len(list(csv.DictReader((folder / CSV).open()))) == 4, "the table is of all"


def test_a_run_of_a_dead_worker_is_interrupted_and_free(tmp_path, corpus):
    (run,) = small(tmp_path, corpus, "--steps", "4").runs
    with owned(claims.claim(tmp_path, run)):
        record = owner.last_owner(claims.claim(tmp_path, run))
        assert record.pid == os.getpid() and claims.holder(tmp_path, run) == record
    path = claims.claim(tmp_path, run) / "owner" / "00000001.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(record, born="before"))))
    assert claims.holder(tmp_path, run) is None and claims.status(tmp_path, run) == "queued"
    claims.run_folder(tmp_path, run).mkdir(parents=True)
    (claims.run_folder(tmp_path, run) / "config.json").write_text("{}")
    assert claims.status(tmp_path, run) == "interrupted"
    with owned(claims.claim(tmp_path, run)):
        assert claims.status(tmp_path, run) == "running"


def test_a_worker_on_another_machine_is_taken_to_live_until_it_is_watched(tmp_path, corpus):
    (run,) = small(tmp_path, corpus, "--steps", "4").runs
    path = claims.claim(tmp_path, run) / "owner" / "00000001.json"
    path.parent.mkdir(parents=True)
    record = owner.Record(host="another", machine="another", pid=1, born="1", since="now")
    path.write_text(json.dumps(dataclasses.asdict(record)))
    assert claims.status(tmp_path, run) == "running" and claims.holder(tmp_path, run).host == "another"


def test_a_worker_whose_sweep_was_removed_and_begun_anew_writes_nothing_there(tmp_path, corpus, monkeypatch):
    folder = tmp_path / "sweep"
    small(folder, corpus, "--seed", "0,1,2", "--steps", "4")

    def trained(config, judge):
        folder.rename(tmp_path / "old")
        small(folder, corpus, "--seed", "3,4", "--steps", "4")
        raise owner.FolderLost("is gone")

    monkeypatch.setattr(worker, "train", trained)
    assert work(folder) == FAILED
    assert not (folder / "runs").exists() and list((folder / "claims").glob("*")) == []


def test_a_table_that_lags_or_is_gone_is_written_by_the_next_command(tmp_path, corpus):
    """As where a worker was killed between an outcome and its line."""
    (run,) = small(tmp_path, corpus, "--steps", "4").runs
    claims.write_outcome(tmp_path, run, claims.Outcome(status="done", step=4))
    assert work(tmp_path) == DONE
    (row,) = csv.DictReader((tmp_path / CSV).open())
    assert row["status"] == "done" and (tmp_path / PARQUET).exists()
    (tmp_path / CSV).unlink()
    (tmp_path / CSV).mkdir()  # cannot be written
    assert work(tmp_path) == DONE


def test_an_error_that_runs_share_is_said_once(tmp_path, corpus, monkeypatch, caplog):
    sweep = small(tmp_path, corpus, "--seed", "0,1,2,3", "--steps", "4")

    def trained(config, judge):
        where = Path(config.out)
        raise ValueError(f"{where} has too few rows" if config.seed < 2 else "another") from (
            None if config.seed < 3 else KeyError()
        )

    monkeypatch.setattr(worker, "train", trained)
    monkeypatch.setattr(worker, "is_bad_input", lambda error: "another" not in str(error))
    with caplog.at_level("INFO", "plait"):
        assert work(tmp_path) == FAILED
    ended = [one.getMessage() for one in caplog.records if " is failed: " in one.getMessage()]
    assert len(ended) == 4 and "has too few rows" in ended[0] and ended[1] == "run 2 of 4 is failed: the same error as run 1"
    assert ended[2].endswith("ValueError: another") and ended[3] == "run 4 of 4 is failed: the same error as run 3"
    assert caplog.text.count("Traceback") == 1
    assert all("too few rows" in claims.outcome(tmp_path, run).error for run in sweep.runs[:2]), "kept in full"
    with caplog.at_level("INFO", "plait"):
        assert work(tmp_path) == FAILED
    again = [one.getMessage() for one in caplog.records if " is failed: " in one.getMessage()][4:]
    assert again == ended, "a new command says it again"


def test_an_error_that_runs_of_two_workers_share_is_said_once(tmp_path, corpus, monkeypatch, caplog):
    sweep = small(tmp_path, corpus, "--seed", "0,1", "--steps", "4")
    failures = claims.failures(tmp_path, sweep.runs)

    def trained(config, judge):
        raise ValueError(f"{config.out} is of no use")

    monkeypatch.setattr(worker, "train", trained)
    monkeypatch.setattr(worker, "is_bad_input", lambda error: False)
    with caplog.at_level("INFO", "plait"):
        for number, run in enumerate(sweep.runs):
            assert work(tmp_path, number, 2, failures, only=[run.name]) == FAILED
    ended = [one.getMessage() for one in caplog.records if " is failed: " in one.getMessage()]
    assert ended[0].endswith("is of no use") and ended[1] == "run 2 of 2 is failed: the same error as run 1"
    assert caplog.text.count("Traceback") == 1


def test_runs_that_an_event_ended_say_which(tmp_path, corpus, monkeypatch):
    sweep = small(tmp_path, corpus, "--seed", "0,1", "--steps", "9", "--event.loss_spike.action", "stop")

    def train(config, judge):
        folder = Path(config.out)
        folder.mkdir(parents=True)
        events = [Event(3, kind, None, None, 9.0, 1.0, f"{kind} at 9") for kind in ("loss_spike", "loss_spike", "other")]
        lines = [json.dumps(event.to_dict()) + "\n" for event in Actions(config).take(3, events)]
        (folder / "events.jsonl").write_text("".join(lines))
        return Result(folder, 4, False, {}, by_event=True)

    monkeypatch.setattr(worker, "train", train)
    assert work(tmp_path) == DONE and standing(tmp_path, sweep) == ["stopped"] * 2
    table, over = show.status_table(tmp_path, sweep)
    assert over and table.caption.plain == "runs 1, 2 stopped: loss_spike at 9; the run stops after step 4"


@pytest.fixture
def full(tmp_path):
    """A function that lets a folder have too little room for a checkpoint; another gives it back."""
    mounted: list[Path] = []

    def fill(folder):
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this process may not mount a tmpfs to fill")
        mounted.append(folder)

    def free():
        while mounted:
            subprocess.run(["umount", "-l", str(mounted.pop())], check=True)

    yield fill, free
    free()


@pytest.mark.slow
def test_a_full_disk_in_one_run_harms_no_other(tmp_path, corpus, compile_cache, full):
    sweep = small(tmp_path, corpus, "--seed", "0,1", "--steps", "2")
    fill, free = full
    fill(claims.run_folder(tmp_path, sweep.runs[0]))
    assert work(tmp_path) == FAILED
    assert standing(tmp_path, sweep) == ["failed", "done"]
    assert "make room or mend the disk" in claims.outcome(tmp_path, sweep.runs[0]).error
    assert {row["status"] for row in csv.DictReader((tmp_path / CSV).open())} == {"failed", "done"}
    free()
    assert work(tmp_path) == DONE and standing(tmp_path, sweep) == ["done", "done"]


def test_runs_that_are_added_meanwhile_are_trained_too(tmp_path, corpus, monkeypatch):
    def trained(config, judge):
        small(tmp_path, corpus, "--seed", "0,1,2")
        return Result(Path(config.folder), config.steps, True, {})

    monkeypatch.setattr(worker, "train", trained)
    small(tmp_path, corpus, "--seed", "0")
    assert work(tmp_path) == DONE
    assert standing(tmp_path, read(tmp_path)) == ["done"] * 3
    assert [row["seed"] for row in csv.DictReader((tmp_path / CSV).open())] == ["0", "1", "2"]

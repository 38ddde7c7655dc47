"""What is said of the runs of several workers."""

import logging

from plait.tests.train.sweep.common import small
from plait.train.sweep.workers import claims, news
from plait.train.sweep.workers.claims import Outcome
from plait.train.sweep.workers.news import News


def test_each_run_that_ends_is_told_once_with_how_many_are_left(tmp_path, corpus, monkeypatch, caplog):
    sweep = small(tmp_path, corpus, "--seed=0,1,2,3")
    first, second, third, _ = sweep.runs
    monkeypatch.setattr(news, "EVERY_SECONDS", 0.0)
    claims.write_outcome(tmp_path, first, Outcome(status="done"))  # of an earlier session
    told = News(tmp_path, sweep.planned)
    with caplog.at_level(logging.INFO, logger="plait"):
        told.look()
        claims.write_outcome(tmp_path, second, Outcome(status="failed", error="x"))
        claims.write_outcome(tmp_path, third, Outcome(status="done"))
        told.look()
        told.look()
        claims.write_outcome(tmp_path, second, Outcome(status="done"))
        told.look()
    lines = [line.split(", left")[0] for line in caplog.messages]
    assert sorted(lines[:2]) == sorted([f"{second.name} is failed: 1 of 4 are over", f"{third.name} is done: 2 of 4 are over"])
    assert lines[2:] == [f"{second.name} is done: 3 of 4 are over"]


def test_last_runs_are_told_and_those_that_failed_are_not_to_come(tmp_path, corpus, caplog):
    first, second, third = small(tmp_path, corpus, "--seed=0,1,2").runs
    told = News(tmp_path, 3)
    claims.write_outcome(tmp_path, first, Outcome(status="failed", error="x"))
    claims.write_outcome(tmp_path, second, Outcome(status="done"))
    with caplog.at_level(logging.INFO, logger="plait"):
        told.look()
        assert not caplog.messages, "looked too soon"
        told.look(final=True)
        assert [", left about" in line for line in caplog.messages] == [True, True]
        claims.write_outcome(tmp_path, third, Outcome(status="done"))
        told.look(final=True)
    assert caplog.messages[2:] == [f"{third.name} is done: 2 of 3 are over"]


def test_of_some_runs_those_are_told(tmp_path, corpus, monkeypatch, caplog):
    first, second, third = small(tmp_path, corpus, "--seed=0,1,2").runs
    monkeypatch.setattr(news, "EVERY_SECONDS", 0.0)
    told = News(tmp_path, 3, {second.name, third.name})
    for run in (first, second):
        claims.write_outcome(tmp_path, run, Outcome(status="done"))
    with caplog.at_level(logging.INFO, logger="plait"):
        told.look()
    assert [line.split(", left")[0] for line in caplog.messages] == [f"{second.name} is done: 1 of 2 are over"]


def test_what_was_removed_or_damaged_ends_nobody_who_waits(tmp_path, corpus, monkeypatch):
    sweep = small(tmp_path, corpus, "--seed=0,1")
    monkeypatch.setattr(news, "EVERY_SECONDS", 0.0)
    told = News(tmp_path, sweep.planned)
    for run in sweep.runs:
        claims.write_outcome(tmp_path, run, Outcome(status="done"))
    first, second = (claims.claim(tmp_path, run) / claims.OUTCOME for run in sweep.runs)
    first.write_text('{"status": "do')
    second.unlink()
    second.symlink_to(tmp_path / "removed")  # between listing and reading
    told.look()

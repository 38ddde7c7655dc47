"""One owner of a run folder at a time, however many ask, wherever they run and however they end."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from plait.train.run_folder import owner as owning
from plait.train.run_folder.owner import FolderInUse, FolderLost, Record, owned

PROGRAM = """
import sys, time
from pathlib import Path
from plait.train.run_folder import owner as owning
owning.RENEW_SECONDS, owning.SURE_SECONDS = 0.1, 0.5
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    with owning.owned(folder) as check:
        print("mine", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            check()
            with (folder / "log").open("a") as file:
                file.write(f"{id(owning)}\\n")
            time.sleep(0.01)
    print("left", flush=True)
except owning.FolderInUse as error:
    print("refused:", error, flush=True)
except owning.FolderLost as error:
    print("lost:", error, flush=True)
"""


class Contender:
    """A process that asks for the folder when told to, and keeps it for so long."""

    def __init__(self, folder, seconds=0.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.says() == "ready"

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def says(self):
        return self.process.stdout.readline().strip()

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def contend(tmp_path):
    there = []

    def contend(count, seconds=0.0):
        mine = [Contender(tmp_path / "run", seconds) for _ in range(count)]
        there.extend(mine)
        return mine

    yield contend
    for one in there:
        one.end()


def race(contenders):
    """Who got the folder, when all ask at one moment; the others are refused."""
    for one in contenders:
        one.go()
    answers = [one.says() for one in contenders]
    winners = [one for one, answer in zip(contenders, answers, strict=True) if answer == "mine"]
    (winner,) = winners
    pid = winner.process.pid
    assert all(answer == "mine" or f"is in use: process {pid} on " in answer for answer in answers), answers
    return winner


@pytest.mark.parametrize("rounds", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_of_many_that_ask_at_one_moment_one_gets_it_and_killed_leaves_it_free(rounds, contend):
    rng = random.Random(rounds)
    for _ in range(rounds):
        winner = race(contend(4, seconds=60))
        time.sleep(rng.uniform(0, 0.2))
        if rng.random() < 0.7:
            winner.process.kill()  # not waited for: what only waits to be reaped is dead
        else:
            winner.end()


def test_second_is_refused_at_once_with_who_holds_it(tmp_path):
    with owned(tmp_path / "run"):
        start = time.monotonic()
        with (
            pytest.raises(FolderInUse, match=rf"in use: process {os.getpid()} on .* trains there since 20.*; wait until"),
            owned(tmp_path / "run"),
        ):
            pass
        assert time.monotonic() - start < 1
    with owned(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_was_written_is_left_as_it_was(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "deep" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "deep" / "run").exists()


def elsewhere(folder, number=1, **changes):
    """The file of an owner on another machine."""
    record = dataclasses.replace(Record("far", "another machine", 7, "1", "2026-01-01 00:00:00 UTC"), **changes)
    path = folder / "owner" / f"{number:08d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(record)))
    return path, record


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(owning, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(owning, "_POLL_SECONDS", 0.05)


def test_an_owner_on_another_machine_that_is_renewed_is_left_alone(quick, tmp_path):
    path, record = elsewhere(tmp_path)

    def renew():
        time.sleep(0.4)
        path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(record, beat=1))))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(FolderInUse, match="process 7 on far"), owned(tmp_path):
        pass
    thread.join()


OTHERS = {
    "on another machine, silent": {},
    "on another machine, left": {"left": True},
    "whose number another process has": {"machine": owning._machine(), "pid": os.getpid(), "born": "1"},
    "whose process is gone": {"machine": owning._machine(), "pid": 1 << 30},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("clock", [0, 30 * 86400], ids=["", "whose clock is a month ahead"])
def test_an_owner_is_followed(changes, clock, quick, tmp_path):
    path, _ = elsewhere(tmp_path, **changes)
    os.utime(path, (time.time() + clock,) * 2)
    start = time.monotonic()
    with owned(tmp_path) as check:
        waited = time.monotonic() - start
        check()
        assert [p.name for p in (tmp_path / "owner").iterdir()] == ["00000002.json"]
    assert waited > 0.9 if changes == {} else waited < 0.5


def test_a_file_that_says_nothing_is_watched_like_one_from_elsewhere(quick, tmp_path):
    elsewhere(tmp_path)[0].write_text("")
    with owned(tmp_path):
        assert (tmp_path / "owner" / "00000002.json").exists()


def test_a_full_disk_leaves_no_file_to_wait_for(tmp_path, monkeypatch):
    def full(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owning, "text_of", full)
    with pytest.raises(OSError, match="space"), owned(tmp_path):
        pass
    assert list((tmp_path / owning.OWNER).iterdir()) == []


def test_one_that_was_stopped_and_followed_begins_no_write_more(contend, tmp_path):
    (one,) = contend(1, seconds=60)
    one.go()
    assert one.says() == "mine"
    while not (tmp_path / "run" / "log").exists():
        time.sleep(0.01)
    os.kill(one.process.pid, signal.SIGSTOP)
    time.sleep(0.7)
    elsewhere(tmp_path / "run", 2)
    before = (tmp_path / "run" / "log").read_bytes()
    os.kill(one.process.pid, signal.SIGCONT)
    assert "now belongs to process 7 on far since 2026-01-01" in one.says()
    more = (tmp_path / "run" / "log").read_bytes().removeprefix(before)
    assert more.count(b"\n") <= 1, "it may have been stopped between looking and writing"
    assert not json.loads((tmp_path / "run" / "owner" / "00000002.json").read_text())["left"]


def test_a_folder_that_was_removed_is_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(owning, "SURE_SECONDS", 0.0)
    with owned(tmp_path / "run") as check:
        check()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(FolderLost, match="is gone"):
            check()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_removed_and_begun_anew_is_lost_though_numbers_are_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(owning, "SURE_SECONDS", 0.0)
    with owned(tmp_path / "run") as check:
        check()
        (tmp_path / "run").rename(tmp_path / "moved")
        path, record = elsewhere(tmp_path / "run")
        with pytest.raises(FolderLost, match="now belongs to process 7 on far"):
            check()
    assert json.loads(path.read_text()) == dataclasses.asdict(record)

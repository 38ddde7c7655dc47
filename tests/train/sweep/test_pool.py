"""A sweep survives the death of all its processes, at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.tests.train.sweep.common import SMALL
from plait.train.run_folder.lines import read_metrics
from plait.train.sweep.record import SWEEP, read
from plait.train.sweep.workers import claims

STEPS, RUNS = 30, 12


def started(folder: Path, corpus: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "plait.launch", "sweep", "lm_tiny", *SMALL, "--data.source", str(corpus), *words]
    return subprocess.Popen([*command, "--out", str(folder)], stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    """The processes that a process has started and not yet seen end."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def finished(folder: Path) -> dict[str, int]:
    """When the runs that are done were found to be."""
    runs = read(folder).runs if (folder / SWEEP).exists() else ()
    return {
        run.name: (claims.claim(folder, run) / "outcome.json").stat().st_mtime_ns
        for run in runs
        if claims.status(folder, run) == "done"
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_twelve_runs_of_two_workers_that_are_killed_three_times_are_done_once_each(tmp_path, corpus):
    words = ["--seed", ",".join(map(str, range(RUNS))), "--steps", str(STEPS), "--checkpoint-every", "5", "--workers", "2"]
    chance, seen = random.Random(0), {}
    for _ in range(3):
        process = started(tmp_path, corpus, *words)
        before = len(seen)
        deadline = time.monotonic() + 600
        while len(seen) < before + chance.randint(1, 2) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(chance.random())
            now = finished(tmp_path)
            assert now.items() >= seen.items(), "what was done is done again"
            seen = now
        time.sleep(3 * chance.random())
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert 3 <= len(seen) < RUNS
    process = started(tmp_path, corpus, *words)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    now = finished(tmp_path)
    assert len(now) == RUNS and now.items() >= seen.items()
    for run in read(tmp_path).runs:
        steps = [line["step"] for line in read_metrics(claims.run_folder(tmp_path, run)) if "loss/train" in line]
        assert steps == list(range(1, STEPS + 1)), run.name
        assert claims.outcome(tmp_path, run).failures == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_a_worker_that_dies_is_followed_and_a_run_that_kills_two_fails_alone(tmp_path, corpus):
    process = started(tmp_path, corpus, "--seed", "0,1", "--steps", "3000", "--checkpoint-every", "10")
    victim = None
    for _ in range(2):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            time.sleep(0.2)
            run = read(tmp_path).runs[0] if (tmp_path / SWEEP).exists() else None
            holder = run and claims.holder(tmp_path, run)
            if holder and holder.pid != victim and (claims.run_folder(tmp_path, run) / "config.json").exists():
                victim = holder.pid
                os.kill(victim, signal.SIGKILL)
                break
    deadline = time.monotonic() + 300
    other = read(tmp_path).runs[1]
    while not (holder := claims.holder(tmp_path, other)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert claims.status(tmp_path, read(tmp_path).runs[0]) == "failed" and holder
    assert "was killed by SIGKILL, 2 times" in claims.outcome(tmp_path, read(tmp_path).runs[0]).error
    while not (claims.run_folder(tmp_path, other) / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert claims.status(tmp_path, other) == "interrupted", "stopped and saved"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_a_search_of_two_workers_that_are_killed_twice_proposes_each_trial_once(tmp_path, corpus):
    pytest.importorskip("optuna")
    words = ["--search.sampler", "random", "--search.trials", "5", "--seeds", "2", "--optimizer.weight-decay", "0.0..1.0"]
    words += ["--stop.rule", "halving", "--stop.first", "10", "--stop.metric", "loss/train", "--steps", str(STEPS)]
    words += ["--checkpoint-every", "5", "--workers", "2"]
    seen: dict[str, int] = {}
    for wanted in (1, 4):
        process = started(tmp_path, corpus, *words)
        deadline = time.monotonic() + 600
        while len(over(tmp_path)) < wanted and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.3)
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        now = over(tmp_path)
        assert now.items() >= seen.items() and len(now) < 10, "what was over is done again"
        seen = now
    proposed = {path.name: path.read_text() for path in (tmp_path / "trials").glob("*.json")}
    process = started(tmp_path, corpus, *words)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    after = {path.name: path.read_text() for path in (tmp_path / "trials").glob("*.json")}
    assert sorted(after) == [f"{n:05}.json" for n in range(5)] and after.items() >= proposed.items()
    assert len(over(tmp_path)) == 10 and over(tmp_path).items() >= seen.items()
    states = [claims.status(tmp_path, run) for run in read(tmp_path).runs]
    assert set(states) == {"done", "pruned"}, states


def over(folder: Path) -> dict[str, int]:
    """When the runs that are over were found to be."""
    runs = read(folder).runs if (folder / SWEEP).exists() else ()
    ended = [run for run in runs if claims.status(folder, run) in claims.OVER]
    return {run.name: (claims.claim(folder, run) / "outcome.json").stat().st_mtime_ns for run in ended}

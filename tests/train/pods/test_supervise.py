"""The supervisor: it tells dead from hung from done, in a process that does nothing but what the case says."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from plait.configs import codec
from plait.train.pods.hosts import heartbeat
from plait.train.pods.hosts import supervise as supervising
from plait.train.pods.hosts.heartbeat import Heartbeat, State
from plait.train.pods.hosts.host import Host, HostsOptions
from plait.train.pods.hosts.supervise import supervise

HERE = Host("127.0.0.1:1", 2, 1)


@pytest.fixture(autouse=True)
def attached():
    """As under a terminal: what started the tests may ignore SIGHUP, as `nohup` does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Supervises a Python program that has a heartbeat; gives status, seconds and what was said."""

    def run(program, host=HERE, **options):
        text = (
            "import os, signal, sys, time\nfrom plait.train.pods.hosts import heartbeat\nheartbeat.start()\n"
            + textwrap.dedent(program)
        )
        (tmp_path / "program.py").write_text(text)
        monkeypatch.setattr(supervising, "LAUNCH", (sys.executable, str(tmp_path / "program.py")))
        monkeypatch.setattr(supervising, "SILENCE_SECONDS", 3.0)
        monkeypatch.setattr(supervising, "_SETTLE_SECONDS", 0.1)
        start = time.monotonic()
        status = supervise([], host, HostsOptions(**options))
        return status, time.monotonic() - start, capfd.readouterr().err

    return run


@pytest.mark.parametrize("status", [0, 2, 75])
def test_an_orderly_end_is_passed_on(status, run):
    found, _, said = run(f"sys.exit({status})")
    assert (found, said) == (status, "")


def test_what_was_killed_is_said(run):
    status, _, said = run("heartbeat.step(7); time.sleep(1.2); os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 1 and "host 1 of 2: the training process (pid" in said and "was killed by SIGKILL in step 8" in said
    assert "with --resume goes on" in said


def test_an_abort_by_the_coordinator_is_explained(run):
    assert "another host was lost" in run("heartbeat.step(7); time.sleep(1.2); os.abort()")[2]
    said = run("with heartbeat.phase('connect'):\n    time.sleep(1.2)\n    os.abort()", connect_seconds=5)[2]
    assert "did not meet the other hosts at hosts.coordinator=127.0.0.1:1 within hosts.connect_seconds=5" in said


def test_a_stopped_process_is_noticed_in_any_phase(run):
    status, seconds, said = run("with heartbeat.phase('compile'):\n    os.kill(os.getpid(), signal.SIGSTOP)")
    assert status == 1 and seconds < 8 and "silent for" in said and "in phase 'compile': it is stopped or stuck" in said


def test_a_process_that_lives_and_takes_no_step_is_noticed(run):
    program = "heartbeat.step(1); time.sleep(.1); heartbeat.step(2); time.sleep(60)"
    status, seconds, said = run(program, step_seconds=2.0)
    assert status == 1 and seconds < 8 and "in step 3 for" in said and "it hangs, or waits for a host that does" in said


def test_slow_steps_and_compiling_are_no_hang(run):
    program = """
    with heartbeat.phase("compile"):
        time.sleep(2.5)
    heartbeat.step(1)
    time.sleep(0.8)
    heartbeat.step(2)
    time.sleep(2.5)
    heartbeat.step(3)
    """
    assert run(program, step_seconds=1.0)[0] == 0


def test_clocks_that_differ_or_are_set_are_no_silence(run):
    """The file's time is that of the file system's clock, here half a century behind."""
    program = """
    write = heartbeat.write_atomically
    heartbeat.write_atomically = lambda path, *text, **options: (write(path, *text, **options), os.utime(path, (1, 1)))
    time.sleep(4.5)
    """
    assert run(program)[::2] == (0, "")


def test_time_in_which_the_supervisor_was_stopped_is_no_silence(monkeypatch, tmp_path):
    child = supervising.Child([sys.executable, "-c", ""], HERE, tmp_path, HostsOptions())
    child.process.wait()
    Heartbeat(tmp_path / "heartbeat-1.json")
    assert child.hung() is None
    monkeypatch.setattr(supervising.time, "monotonic", lambda now=time.monotonic: now() + 600)
    assert child.hung() is None


def test_a_process_that_was_stopped_as_a_whole_is_not_in_its_step_for_long(tmp_path):
    program = """
    import json, os, pathlib, sys, time
    from plait.train.pods.hosts import heartbeat
    heartbeat._PAUSE_SECONDS = 1.5
    heart = heartbeat.Heartbeat(pathlib.Path(sys.argv[1]))
    heart.step(3)
    time.sleep(1.2)
    print(flush=True)
    time.sleep(5)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "beat")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.5)
        state = codec.load(State, tmp_path / "beat")
        process.kill()
    assert state.phase == "step" and state.age < 4


def test_sighup_asks_for_an_end_unless_it_is_ignored():
    assert signal.SIGHUP in supervising.ending_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervising.ending_signals() == (signal.SIGTERM, signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(number, run):
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    program = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), os._exit(75)))\ntime.sleep(60)"
    status, seconds, said = run(program)
    assert status == 75 and 1.9 < seconds < 6
    assert ("a second one ends at once" in said) == (number == signal.SIGINT)


def test_one_of_several_here_that_dies_ends_the_others(run):
    program = "if os.environ['PLAIT_HOST_INDEX'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    status, seconds, said = run(program, host=None, local=3)
    assert status == 1 and seconds < 5 and "host 1 of 3" in said


def test_restarts_go_on_until_they_are_used_up(run, tmp_path):
    program = f"open({str(tmp_path / 'starts')!r}, 'a').write(str(sys.argv[1:]) + ';')\nsys.exit(1)"
    status, _, said = run(program, restarts=2)
    assert status == 1 and "1 restarts left" in said
    assert (tmp_path / "starts").read_text() == "[];['--resume'];['--resume'];"
    (tmp_path / "starts").unlink()
    assert run("sys.exit(2)", restarts=2)[0] == 2, "bad input stays bad"


def test_process_ends_when_its_supervisor_was_killed(tmp_path):
    child = "import time\nfrom plait.train.pods.hosts import heartbeat\nheartbeat.start()\ntime.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(60)"
    )
    file = tmp_path / "heartbeat"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env={**os.environ, heartbeat.VARIABLE: str(file)}
    )
    pid = int(supervisor.stdout.readline())
    while not file.exists():
        time.sleep(0.05)
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, "the process goes on with nobody watching"
        time.sleep(0.1)


def alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_phase_that_gets_on_is_no_hang(run, monkeypatch):
    """However long it takes; a corpus may have any size."""
    monkeypatch.setattr(supervising, "PHASE_SECONDS", {"data": 2.5})
    reading = "with heartbeat.phase('data'):\n    for _ in range(5):\n        time.sleep(1)\n        "
    assert run(reading + "heartbeat.advance(1, 1)")[0] == 0
    status, _, said = run(reading + "pass")
    assert status == 1 and "has been in phase 'data' for" in said

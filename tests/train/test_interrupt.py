"""Ctrl-C: a first one lets what is in progress end and says so at once, a second one ends the process, wherever it is."""

import signal
import threading
import time

import pytest

from plait.launch import main
from plait.tests.train.common import launch
from plait.tests.train.sweep.common import SMALL
from plait.train.pods.hosts.termination import Termination
from plait.train.run_folder.going_on import checkpoint_steps

LONG_COMPILATION = """
import hashlib, sys
from plait.launch import main
from plait.train.loop import _Loop

def compile_long(loop):
    print("compiling for long", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)  # in which, as in XLA, no Python runs

_Loop._compile = compile_long
sys.exit(main(sys.argv[1:]))
"""


def test_while_compiling_it_is_answered_at_once_and_a_second_ends(corpus, compile_cache, tmp_path):
    out = tmp_path / "run"
    words = ["train", "lm_tiny", *SMALL, "--data.source", str(corpus), "--steps", "3", "--out", str(out)]
    process = launch(*words, cache=compile_cache, program=["-c", LONG_COMPILATION])
    said: list[str] = []

    def told(what: str) -> float:
        while what not in " ".join(said):
            said.append(process.stdout.readline().strip())
            assert said[-1], said
        return time.monotonic()

    try:
        began = told("compiling for long")
        process.send_signal(signal.SIGINT)
        assert told("a second Ctrl-C ends it at once") - began < 5
        assert "SIGINT: stopping after the compilation; --resume goes on" in " ".join(said)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and "interrupted: what was saved before stays" in process.stdout.read()
    finally:
        process.kill()
        process.communicate()
    assert main([*words, "--resume"]) == 0 and checkpoint_steps(out) == [3]


def test_in_a_step_a_second_one_is_an_exception(caplog):
    """Which leaves the run in order; the thread that hears signals is gone with it, and handlers are as before."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Termination() as termination:
        termination.compiling = False
        signal.raise_signal(signal.SIGTERM)
        assert termination.asked
        signal.raise_signal(signal.SIGINT)
    (told,) = [record.message for record in caplog.records]
    assert told == "SIGTERM: saving after this step, then stopping; --resume goes on"
    assert signal.getsignal(signal.SIGINT) == before and signal.set_wakeup_fd(-1) == -1
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(5)
            assert not thread.is_alive()

"""Several hosts of a run as processes on this machine, each with its own supervisor, as on a pod."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.tests.train.common import ROOT, environment

# One softmax layer, no probes: a step that compiles in seconds.
SMALL = [
    *("lm_tiny", "--model.pattern", "softmax", "--model.num-layers", "1", "--probe-every", "None", "--log-every", "1"),
    *("--eval-every", "10", "--eval-batches", "1", "--checkpoint-every", "4", "--keep-last", "3", "--data.seq-len", "16"),
]


class Pod:
    """`launch.py train` on `count` hosts; `devices` are those of each host, `own` the arguments that a host has beside the common ones."""

    def __init__(
        self, count: int, *words: object, cache: Path, devices: int = 1, own: Sequence[Sequence[object]] = (), **variables: str
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 (closed with the processes)
        self.processes = []
        for index, output in enumerate(self.outputs):
            place = ("--hosts.coordinator", self.address, "--hosts.count", count, "--hosts.index", index)
            where = (*place, "--hosts.connect-seconds", 40) if count > 1 else ()
            mine = own[index] if index < len(own) else ()
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "launch.py"), "train", *map(str, (*words, *where, *mine))],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment(cache), "XLA_FLAGS": flags, **variables},
                )
            )

    def training(self, index: int) -> int:
        """The process id of the training process of a host."""
        supervisor = self.processes[index].pid
        (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(child)

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Waits for a condition while all hosts run."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(p.poll() is None for p in self.processes), self.finish()
            assert time.monotonic() < deadline, self.finish(kill=True)
            time.sleep(0.005)

    def kill(self, index: int, number: int = signal.SIGKILL) -> float:
        """Sends a signal to the training process of a host; gives the time."""
        os.kill(self.training(index), number)
        return time.monotonic()

    def finish(self, seconds: float = 180, *, kill: bool = False) -> list[tuple[int, str]]:
        """Exit status and output, in one line, of each host, once all have ended."""
        deadline = time.monotonic() + seconds
        try:
            if not kill:
                for process in self.processes:
                    process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(60)
                    except subprocess.TimeoutExpired:
                        process.kill()
        texts = []
        for output in self.outputs:
            output.seek(0)
            texts.append(re.sub(r"\s+", " ", output.read()))
            output.close()
        return [(process.wait(), text) for process, text in zip(self.processes, texts, strict=True)]


def statuses(results: Sequence[tuple[int, str]]) -> list[int]:
    """The exit statuses."""
    return [status for status, _ in results]


def checkpoints_of(out: Path) -> list[int]:
    """Steps with a finished checkpoint."""
    return sorted(int(p.parent.name) for p in (out / "checkpoints").glob("[0-9]*/manifest.json") if p.parent.name.isdigit())

"""A corpus prepared: the workers of this machine, what they tell, and the description when all shards are there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from plait.data.cache import sweep
from plait.data.config import DataConfig, DataError
from plait.data.shards.pieces import Piece
from plait.data.shards.prepared import TOKENIZER, PreparedMeta, write_prepared
from plait.data.shards.shard import name_of, read_shard
from plait.data.sources.source import MAX_REPORTED, PREPARED
from plait.data.tokenising import token_dtype
from plait.data.tokenizers.files import read_meta
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.pods.hosts.supervise import Signals
from plait.train.prepare.job import CLAIMS, Job, claim, is_held, is_made, read_job
from plait.train.run_folder.owner import FolderInUse, FolderLost, owned
from plait.train.terminal.progress import format_seconds

log = logging.getLogger("plait")

_POLL_SECONDS = 0.2
_SAY_SECONDS = 10.0
_RECENT_SECONDS = 120.0
"""Over which speed and the time left are reckoned."""
_LEAVE_SECONDS = 10.0
_WAIT_SECONDS = 5.0


def prepare(data: DataConfig, folder: Path, *, workers: int, shard_mib: int) -> PreparedMeta | None:
    """Tokenises what `data` reads into shards in `folder`, or goes on with that; None where a signal ended it before the end.

    Any number of machines may do so in one folder at once.

    Raises:
        ValueError: the source or the folder cannot be used.
        TrainingFailed: workers have died.
    """
    job = Job.of(data, shard_mib)
    job.begin(folder)
    sweep(folder)
    _settle_tokenizer(job, folder)
    _, tokenizer, pieces = read_job(folder)
    left = lambda: [number for number, piece in enumerate(pieces) if not is_made(folder, number, piece)]
    while missing := left():
        (folder / PREPARED).unlink(missing_ok=True)  # of a source that has changed
        pool = _Pool(folder, pieces, missing, token_dtype(tokenizer).itemsize)
        if not pool.run(min(workers, len(missing))):
            return None
        if still := left():
            if not any(is_held(folder, number) for number in still):
                raise TrainingFailed(f"{folder} has {len(pieces) - len(still)} of {len(pieces)} shards; the same command goes on")
            log.info("waiting for %d shards that other machines make", len(still))
            time.sleep(_WAIT_SECONDS)
    return _finish(job, folder, tokenizer, pieces)


def _settle_tokenizer(job: Job, folder: Path) -> None:
    """Makes the tokenizer, or waits until another process has."""
    while read_meta(folder / TOKENIZER) is None:
        try:
            with owned(claim(folder, TOKENIZER)):
                job.make_tokenizer(folder)
        except (FolderInUse, FolderLost):
            time.sleep(1.0)


def _finish(job: Job, folder: Path, tokenizer: Tokenizer, pieces: Sequence[Piece]) -> PreparedMeta:
    shards = [read_shard(folder / name_of(number)) for number in range(len(pieces))]
    whole = [shard for shard in shards if shard is not None]
    for path in folder.glob("shard-*"):  # of a source that had more
        if path.name not in {name_of(number) for number in range(len(pieces))}:
            shutil.rmtree(path, ignore_errors=True)
    meta = write_prepared(folder, job.data.source, tokenizer, whole)
    shutil.rmtree(folder / CLAIMS, ignore_errors=True)
    sweep(folder)
    return meta


class _Pool:
    """Workers of this machine, and what is known of all."""

    def __init__(self, folder: Path, pieces: Sequence[Piece], missing: Sequence[int], token_bytes: int):
        self._folder, self._pieces, self._token_bytes = folder, pieces, token_bytes
        self._left = set(missing)
        self._total = sum(piece.num_bytes for piece in pieces)
        self._done = self._total - sum(pieces[number].num_bytes for number in missing)
        self._tokens = self._bytes = 0
        self._errors: list[str] = []
        self._recent: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        """Time, tokens and bytes of text made here."""
        self._said = time.monotonic()
        self._lock = threading.Lock()

    def run(self, count: int) -> bool:
        """Until all shards are there that can be made; False where a signal ended it."""
        log.info(
            "preparing %d shards of %.3g GB with %d worker%s; %d are there",
            *(len(self._pieces), self._total / 1e9, count, "s" if count > 1 else "", len(self._pieces) - len(self._left)),
        )
        processes = [self._start(number, count) for number in range(count)]
        threads = [threading.Thread(target=self._hear, args=(process,), daemon=True) for process in processes]
        for thread in threads:
            thread.start()
        with Signals() as signals:
            try:
                while any(process.poll() is None for process in processes):
                    if signals.asked:
                        return False
                    time.sleep(_POLL_SECONDS)
                    if time.monotonic() - self._said > _SAY_SECONDS:
                        self._say()
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LEAVE_SECONDS)
                    process.kill()
                    process.wait()
        for thread in threads:
            thread.join()
        self._say()
        self._judge(processes)
        return True

    def _judge(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        """Raises where shards are lacking that no other machine makes."""
        if self._errors:
            shown = "\n".join(f"  {error}" for error in self._errors[:MAX_REPORTED])
            more = f"\n  and {len(self._errors) - MAX_REPORTED} more" if len(self._errors) > MAX_REPORTED else ""
            raise DataError(f"{len(self._errors)} pieces cannot be read, all others are done:\n{shown}{more}")
        dead = [process.returncode for process in processes if process.returncode]
        if dead and self._left:
            how = f"was killed by {signal.Signals(-dead[0]).name}" if dead[0] < 0 else f"failed with status {dead[0]}"
            raise TrainingFailed(f"a worker {how} and {len(self._left)} shards are left; the same command goes on")

    def _start(self, number: int, count: int) -> subprocess.Popen[str]:
        alone = {} if count == 1 and (os.cpu_count() or 1) == 1 else {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen(
            [sys.executable, "-m", "plait.train.prepare.worker", str(self._folder), str(number), str(count)],
            env={**os.environ, **alone},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C reaches it through this process only
        )

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # of one that was killed in the middle
                continue
            with self._lock:
                self._tokens += told.get("tokens", 0)
                self._bytes += told.get("bytes", 0)
                self._errors += [told["error"]] if "error" in told else []

    def _say(self) -> None:
        """A line that says how far all machines are, and how fast this one is."""
        now = self._said = time.monotonic()
        there = {path.name for path in self._folder.glob("shard-*")}
        for number in [number for number in self._left if name_of(number) in there]:
            self._left.discard(number)
            self._done += self._pieces[number].num_bytes
        with self._lock:
            self._recent.append((now, self._tokens, self._done))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RECENT_SECONDS:
            self._recent.popleft()
        then, tokens, done = self._recent[0]
        seconds = max(now - then, 1e-9)
        speed = (self._tokens - tokens) / seconds
        text_speed = (self._done - done) / seconds
        left = format_seconds((self._total - self._done) / text_speed if text_speed else float("inf") if self._left else 0.0)
        log.info(
            "shards %d of %d  %.3g of %.3g GB  %s tokens here (%.3g GB)  %s tokens/s  left %s",
            *(len(self._pieces) - len(self._left), len(self._pieces), self._done / 1e9, self._total / 1e9),
            *(f"{self._tokens:,}", self._tokens * self._token_bytes / 1e9, f"{speed:,.0f}", left),
        )

"""The report while runs go on: written again when a run folder has something new."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plait.configs.files import parse_json, read_json, write_atomically
from plait.train.report import page, write_report
from plait.train.report.run import no_run
from plait.train.run_folder import owner
from plait.train.run_folder.contents import CONFIG, ENVIRONMENT
from plait.train.run_folder.lines import EVENTS, METRICS
from plait.train.run_folder.probe_files import ATTENTION, LAYERS, PROBES

log = logging.getLogger("plait")

SHARE = 4
"""A page rests at least this many times as long as it took to write."""
_WATCHED = (METRICS, EVENTS, CONFIG, ENVIRONMENT, PROBES, LAYERS, ATTENTION)
_TAIL = 1 << 16  # bytes that hold the last line of metrics


def watch(runs: Sequence[Path], out: Path | None, every: float, say: Callable[[str], None]) -> None:
    """Returns once all runs have ended, or when interrupted; the page then no longer reloads itself.

    Args:
      runs: run folders; one in which a process trains need not have metrics yet.
      out: as for `write_report`.
      every: seconds between looks at the folders.
      say: takes what happens, a line each.
    Raises:
      ValueError: as for `write_report`, at the first page and the last; in between the page stays as it was.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise ValueError(no_run(folder))
    lives = [_Life(folder) for folder in folders]
    written: Path | None = None
    seen: list[tuple[int, int]] | None = None
    try:
        while True:
            goes_on = any(life.goes_on() for life in lives)
            new, start = [mark for folder in folders for mark in _marks(folder)], time.monotonic()
            if goes_on and any(not (life.folder / METRICS).exists() and life.begun for life in lives):
                if seen is None:
                    say("waiting for the first metrics")
            elif new != seen or not goes_on:
                try:
                    page_of = write_report(folders, out, reload=every if goes_on else 0)
                    if written is None:
                        say(
                            f"report: {page_of}"
                            + (f", looked at every {every:g} s until training ends (Ctrl-C ends it)" if goes_on else "")
                        )
                    written = page_of
                except ValueError as error:
                    if written is None or not goes_on:
                        _rest(written)
                        raise
                    log.warning("%s; the page stays as it was", error)
            if not goes_on:
                return
            seen = new
            time.sleep(max(every, SHARE * (time.monotonic() - start)))
    except KeyboardInterrupt:
        _rest(written)


def _rest(written: Path | None) -> None:
    """The page that was written last no longer reloads itself."""
    if written is not None and written.exists():
        write_atomically(written, page.at_rest(written.read_text("utf-8")))


def _marks(folder: Path) -> list[tuple[int, int]]:
    """What changes with everything that a run writes and a report shows."""
    marks = []
    for name in _WATCHED:
        try:
            found = (folder / name).stat()
            marks.append((found.st_mtime_ns, found.st_size))
        except OSError:
            marks.append((0, 0))
    return marks


class _Life:
    """Whether a run goes on, as far as can be seen from here. One without its last step may be taken up again for a while."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.begun = False
        """Whether a process has been seen to train there."""
        self._beat: int | None = None
        self._sign = time.monotonic()

    def goes_on(self) -> bool:
        record = owner.newest(self.folder)
        if record is not None and not record.left and not record.dead:
            if record.dead is False or record.beat != self._beat:
                self._sign, self.begun = time.monotonic(), True
            self._beat = record.beat
        elif _has_last_step(self.folder):
            return False
        return time.monotonic() - self._sign < owner.DEAD_SECONDS


def _has_last_step(folder: Path) -> bool:
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            last = parse_json(file.read().strip().rpartition(b"\n")[2])
        return last["step"] >= read_json(folder / CONFIG)["steps"]
    except (OSError, ValueError, TypeError, KeyError):
        return False

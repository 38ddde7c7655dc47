"""What several workers have come to, for those who wait: each worker's own words go into a file."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path

from plait.configs import codec
from plait.train.sweep.workers import claims
from plait.train.terminal.progress import format_seconds

log = logging.getLogger("plait")

EVERY_SECONDS = 2.0


class News:
    """Says of each run that ends how it did, how many there still are, and when they may be done at the pace since the start."""

    def __init__(self, folder: Path, planned: int, only: Collection[str] | None = None):
        """Args: `only` these runs, by name; None for all, of which so many are planned."""
        self._folder, self._only = folder, only
        self._planned = planned if only is None else len(only)
        self._start = self._last = time.monotonic()
        self._known: dict[Path, int] = {}
        self._over = {path.parent.name for path, status in self._new() if status in claims.OVER}
        self._failed: set[str] = set()
        self._ended = 0

    def look(self, *, final: bool = False) -> None:
        """Says what is new, where the last look is long enough ago or nobody works any more."""
        now = time.monotonic()
        if now - self._last < EVERY_SECONDS and not final:
            return
        self._last = now
        for path, status in self._new():
            self._ended += 1
            (self._over if status in claims.OVER else self._failed).add(path.parent.name)
            left = self._planned - len(self._over | self._failed)  # one that failed is for another command
            pace = f", left about {format_seconds((now - self._start) / self._ended * left)}" if left else ""
            log.info("%s is %s: %d of %d are over%s", path.parent.name, status, len(self._over), self._planned, pace)

    def _new(self) -> list[tuple[Path, str]]:
        """Outcomes that were written since the last time."""
        found: list[tuple[Path, str]] = []
        for path in sorted((self._folder / claims.CLAIMS).glob(f"*/{claims.OUTCOME}")):
            if self._only is not None and path.parent.name not in self._only:
                continue
            try:
                changed = path.stat().st_mtime_ns
                if self._known.get(path) != changed:
                    self._known[path] = changed
                    found.append((path, codec.load(claims.Outcome, path).status))
            except (OSError, ValueError):  # removed, or damaged: whoever needs it says so
                continue
        return found

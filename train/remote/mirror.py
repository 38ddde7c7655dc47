"""A run folder of this machine pushed to its store while it trains, so that the store always holds a run that can go on.

A push goes in rounds. First the files that grow, each as it is then, the config before all others; then the checkpoints that were there
when the round began, the newest first, each with its manifest last; then what this machine has no more is removed, a manifest before what it
is of. So every checkpoint that is whole in the store has the lines up to its step beside it, and nothing goes before what takes its place
is there. Where the run went back, the checkpoints later than that go before the files that no longer tell of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from plait.data.remote.store import Store, StoreError, StoreLost
from plait.train.remote.ownership import Ownership
from plait.train.remote.parts import checkpoint, files_of, goes_before
from plait.train.remote.pulling import Pulled
from plait.train.run_folder.contents import CHECKPOINTS, CONFIG
from plait.train.run_folder.owner import FolderLost
from plait.train.run_folder.seal import MANIFEST

log = logging.getLogger("plait")

EVERY_SECONDS = 30.0
"""Between rounds; a new checkpoint begins one at once."""
_LOOK_SECONDS = 1.0
_LINKS = ".push-"
END_SECONDS = 600.0
"""For so long the end of a run waits for a store that does not answer."""
_FAILED_SECONDS = 60.0
"""The same at the end of a run that failed."""
_LEAVE_SECONDS = 10.0
"""The same to say that the folder is nobody's any more, which the next owner finds out by itself."""


class Mirror:
    """The run folder `folder` and the store that is to hold it."""

    def __init__(self, store: Store, folder: Path, check: Callable[[], None] = lambda: None):
        """Args: `check` is called before each write, and raises where the store's folder is no longer ours."""
        self.store, self.folder, self._check = store, folder, check
        self._pushed: dict[str, tuple[int, int]] = {}
        """Size and time of the files that the store has as they are here."""
        self._there: set[str] = set()
        """Files that the store has from here."""
        self._steps: dict[int, bytes] = {}
        """Checkpoints that are whole in the store, with their manifests."""
        self._leaving: set[int] = set()
        """Checkpoints of which the store may still have a part that is to go."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble: Exception | None = None

    def known(self, found: Pulled) -> None:
        """Takes for pushed what has just been pulled; what else the store has of the run is known to be there."""
        self._there |= found.files
        self._pushed |= {name: mark for name in found.pulled if (mark := _mark(self.folder / name)) is not None}
        self._steps |= found.steps

    def start(self) -> None:
        """Pushes in the background from now on."""
        for left in self.folder.glob(f"{_LINKS}*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Returns when the store holds all that the folder does.

        Raises:
            StoreLost: it could not be pushed for so long; all of it is still in the folder.
            FolderLost: the store's folder belongs to another process.
        """
        self._ended.set()
        if self._thread is not None:
            self.store.give_up()
            self._thread.join()
            self.store.go_on()
        deadline, patience = time.monotonic() + seconds, self.store.patience
        while True:
            try:
                self.store.patience = max(1.0, min(patience, deadline - time.monotonic()))
                return self.push()
            except (StoreError, StoreLost) as error:
                if time.monotonic() > deadline or isinstance(error, StoreError):
                    left = ", ".join(self.left()[:5])
                    raise StoreLost(
                        f"{error}. Not pushed: {left or 'what was removed here'}; all of it is in {self.folder}, "
                        "and the same command with --resume on this machine pushes it"
                    ) from error
                log.warning("%s; trying again until the run's end is pushed, for %.0f s", error, deadline - time.monotonic())
            finally:
                self.store.patience = patience

    def left(self) -> list[str]:
        """What the store has not got as it is here, checkpoints first."""
        files = [name for name in files_of(self.folder) if self._pushed.get(name) != _mark(self.folder / name)]
        return [checkpoint(step) for step, manifest in self._here().items() if self._steps.get(step) != manifest] + files

    def _run(self) -> None:
        last, seen = -EVERY_SECONDS, dict[int, bytes]()
        while not self._ended.wait(_LOOK_SECONDS):
            here = self._here()
            if time.monotonic() - last < EVERY_SECONDS and here.keys() == seen.keys():
                continue
            try:
                self.push()
                if self._trouble is not None:
                    log.info("%s has all of %s again", self.store.address, self.folder)
                self._trouble = None
                seen = here
            except FolderLost:
                return  # which who trains finds out by itself before its next write
            except Exception as error:
                if self._ended.is_set():
                    return
                if self._trouble is None:
                    log.warning("%s; training goes on, and it is tried again until it works", error)
                self._trouble = error
            last = time.monotonic()

    def push(self) -> None:
        """A round."""
        if not (self.folder / CONFIG).is_file():
            if CONFIG not in self._there:  # nothing has begun
                return
            raise StoreError(
                f"{self.folder} has lost its {CONFIG}: nothing is pushed to {self.store.address} any more; restore it"
            )
        here = self._here()
        self._forget_undone(here)
        self._push_files()
        for step in sorted(here, reverse=True):
            self._push_checkpoint(step, here[step])
        newest = max(self._steps, default=0)  # stays, though it is gone here by now, until a newer one is there
        if here and max(here) in self._steps:  # a folder that was emptied by somebody is no reason to empty the store
            for step in [step for step in self._steps if step not in self._here() and step != newest]:
                self._remove(step)
        for step in sorted(self._leaving):  # what a round that failed has left
            self._remove(step)
        gone = [name for name in self._there if not (self.folder / name).exists()]
        if gone:
            self._check()
            self.store.remove(gone)
            self._there -= set(gone)

    def _here(self) -> dict[int, bytes]:
        """The whole checkpoints of this machine, with their manifests."""
        found = {}
        folder = self.folder / CHECKPOINTS
        for entry in folder.iterdir() if folder.is_dir() else []:
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    found[int(entry.name)] = (entry / MANIFEST).read_bytes()
        return found

    def _forget_undone(self, here: dict[int, bytes]) -> None:
        """Removes from the store checkpoints that the run has gone back behind, once the one that it went back to is there."""
        undone = [
            step for step, manifest in self._steps.items() if here and (step > max(here) or here.get(step, manifest) != manifest)
        ]
        if undone:
            earlier = [step for step in here if step < min(undone)]
            if earlier and max(earlier) not in self._steps:
                self._push_checkpoint(max(earlier), here[max(earlier)])
            for step in undone:
                self._remove(step)

    def _push_files(self) -> None:
        names = [name for name in files_of(self.folder) if self._pushed.get(name) != _mark(self.folder / name)]
        for name in filter(goes_before, names):
            self._push_file(name)
        self.store.each(self._push_file, [name for name in names if not goes_before(name)])

    def _push_file(self, name: str) -> None:
        mark = _mark(self.folder / name)
        with contextlib.suppress(FileNotFoundError):  # of a step that was undone meanwhile
            self._check()
            self.store.upload(name, self.folder / name)
            self._there.add(name)
            if mark is not None:
                self._pushed[name] = mark

    def _push_checkpoint(self, step: int, manifest: bytes) -> None:
        """Pushes a checkpoint from links of its own, so that it may be removed here meanwhile."""
        name = checkpoint(step)
        if self._steps.get(step) == manifest:
            return
        with self._linked(self.folder / name) as links:
            if links is None or (links / MANIFEST).read_bytes() != manifest:
                return
            self._remove(step)  # what a push that was cut off has left
            files = {f"{name}/{path.relative_to(links).as_posix()}": path for path in links.rglob("*") if path.is_file()}
            last = f"{name}/{MANIFEST}"

            def put(one: str) -> None:
                self._check()
                self.store.upload(one, files[one])

            self.store.each(put, [one for one in files if one != last])
            put(last)
            self._steps[step] = manifest
            log.debug("%s has checkpoint %d", self.store.address, step)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint from the store, its manifest first."""
        self._leaving.add(step)
        self._steps.pop(step, None)
        there = self.store.objects(checkpoint(step))
        last = f"{checkpoint(step)}/{MANIFEST}"
        self._check()
        self.store.remove([name for name in there if name == last])
        self.store.remove([name for name in there if name != last])
        self._leaving.discard(step)

    @contextlib.contextmanager
    def _linked(self, folder: Path) -> Iterator[Path | None]:
        """A folder with the files of another, which stay when that is removed; None where it is gone by now, or not whole."""
        links = self.folder / f"{_LINKS}{folder.name}-{uuid.uuid4().hex[:8]}"
        try:
            yield links if _copied(folder, links) else None
        finally:
            shutil.rmtree(links, ignore_errors=True)


def _copied(folder: Path, links: Path) -> bool:
    """Whether the files of a checkpoint could be linked before it was removed."""
    try:
        shutil.copytree(folder, links, copy_function=_link)
    except (FileNotFoundError, shutil.Error):
        if (folder / MANIFEST).is_file():
            raise
    return (links / MANIFEST).is_file()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def settle(mirror: Mirror, ownership: Ownership, *, failed: bool) -> None:
    """Pushes the end of a run and leaves the store's folder. Of a run that failed what cannot be pushed is said, and no error."""
    try:
        mirror.finish(_FAILED_SECONDS if failed else END_SECONDS)
    except (StoreError, StoreLost, FolderLost) as error:
        if not failed:
            raise
        log.warning("%s", error)
    finally:
        mirror.store.patience = min(mirror.store.patience, _LEAVE_SECONDS)
        ownership.leave(trace=True)

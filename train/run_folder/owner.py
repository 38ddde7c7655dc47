"""The one owner of a run folder: who may write to it, on any file system and from any number of machines. Needs no JAX.

    owner/00000003.json    who it is, since when, how often it has said that it lives, and whether it has left

Every owner has a number, and creates the file of its number, which a file system lets only one process do. Who wants the folder takes the
number after the highest, once its owner has left or is dead; the owner is who has the highest. So two that come at one moment do not
both get it, and one that was stopped and has been replaced can see so. On the machine of the owner its process is looked up, which needs
no wait. From another machine one watches whether the file is renewed, by the watcher's own clock: no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.train.pods.hosts.failure import TrainingFailed

log = logging.getLogger("plait")

OWNER = "owner"
RENEW_SECONDS = 5.0
SURE_SECONDS = 30.0
"""So long after its last renewal an owner writes without looking whether it has been replaced."""
DEAD_SECONDS = 90.0
"""An owner on another machine that was not renewed for so long is dead: file systems over a network show a change up to a minute late."""
NAMES = re.compile(r"[0-9]{8,}\.json")
"""Files of owners."""
_POLL_SECONDS = 0.5
_PROCESSES = Path("/proc")


class FolderInUse(ValueError):
    """A run folder that another process writes to."""


class FolderLost(TrainingFailed):
    """A run folder that another process has taken over: nothing more may be written."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a file of `owner/` holds."""

    host: str
    machine: str
    """What the process number counts in: a machine since its last start, and there one space of process numbers."""
    pid: int
    born: str
    """Tells the process from a later one of the same number."""
    since: str
    beat: int = 0
    left: bool = False

    @property
    def whose(self) -> tuple[str, ...]:
        """The same for every record of one owner."""
        return (self.host, self.machine, str(self.pid), self.born, self.since)

    @property
    def dead(self) -> bool | None:
        """Whether the process is gone, None where that cannot be known from here."""
        if self.machine != _machine():
            return None
        return _born(self.pid) != self.born


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Callable[[], None]]:
    """The folder belongs to this process inside. Gives what must be called before each write: it raises FolderLost when it has been lost.

    Raises:
        FolderInUse: it belongs to a process that lives; the message says to which.
    """
    number, record = _take(folder)
    owner = _Owner(folder, number, record)
    try:
        yield owner.check
    finally:
        owner.leave()


def last_owner(folder: Path) -> Record | None:
    """Who has taken the folder last, as far as that can be read now; nobody is waited for."""
    numbers = _numbers(folder / OWNER)
    return _read(folder / OWNER / name_of(numbers[-1])) if numbers else None


class _Owner:
    """A folder taken by this process under `number`."""

    def __init__(self, folder: Path, number: int, record: Record):
        self._folder, self._number, self._record = folder, number, record
        self._path = folder / OWNER / name_of(number)
        self._sure = _now()
        self._lost: str | None = None
        self._renewing, self._left = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="owner")
        self._thread.start()

    def check(self) -> None:
        """Raises FolderLost when another owner has followed, as after this process was stopped for long."""
        if self._lost is None and _now() - self._sure > SURE_SECONDS:
            self._renew()
        if self._lost is not None:
            raise FolderLost(f"{self._folder} {self._lost}; this process stops without writing anything more")

    def leave(self) -> None:
        """Gives the folder up, and leaves none where nothing was written."""
        self._left.set()
        self._thread.join()
        self._renew(left=True)
        with contextlib.suppress(OSError):
            if self._lost is None and self._number == 1 and [path.name for path in self._folder.iterdir()] == [OWNER]:
                self._path.unlink()
                self._path.parent.rmdir()
                self._folder.rmdir()

    def _run(self) -> None:
        while not self._left.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self, *, left: bool = False) -> None:
        """Says that the owner lives (or has left), unless another has followed, or begun in a folder of the same name."""
        with self._renewing, contextlib.suppress(OSError):  # what cannot be seen now is looked at again before the next write
            found = max(_numbers(self._path.parent), default=None)
            there = None if found is None else _read(self._path.with_name(name_of(found)))
            if found is None:
                self._lost = self._lost or "is gone"
            elif found != self._number or (there is not None and there.whose != self._record.whose):  # or removed and begun anew
                self._lost = self._lost or f"now belongs to {_whose(self._path.with_name(name_of(found)))}"
            if self._lost is None and there is not None:
                self._record = dataclasses.replace(self._record, beat=self._record.beat + 1, left=left)
                write_atomically(self._path, text_of(self._record), durable=False)
                self._sure = _now()


def newest(folder: Path) -> Record | None:
    """Who took the folder last; None where nobody has."""
    ledger = folder / OWNER
    last = max(_numbers(ledger), default=None)
    return None if last is None else _read(ledger / name_of(last))


def _take(folder: Path) -> tuple[int, Record]:
    """The number under which this process has taken the folder, and what it wrote there."""
    ledger = folder / OWNER
    while True:
        ledger.mkdir(parents=True, exist_ok=True)
        last = max(_numbers(ledger), default=0)
        if last and (holder := _holder(ledger / name_of(last))) is not None:
            raise FolderInUse(
                f"out={str(folder)!r} is in use: {words(holder)} trains there since {holder.since}; wait until it has ended, "
                "end it, or use another --out"
            )
        number, record = last + 1, this_process()
        try:
            with (ledger / name_of(number)).open("x") as file:
                try:
                    file.write(text_of(record))
                    file.flush()
                except OSError:  # a full disk: nobody must wait for whom this file does not name
                    (ledger / name_of(number)).unlink(missing_ok=True)
                    raise
        except (FileExistsError, FileNotFoundError):  # another was faster, or has just left the folder as it found it
            continue
        if max(_numbers(ledger), default=0) == number and _read(ledger / name_of(number)) == record:
            for earlier in _numbers(ledger):
                if earlier < number:
                    with contextlib.suppress(OSError):
                        (ledger / name_of(earlier)).unlink()
            return number, record
        with contextlib.suppress(OSError):  # others have come and gone since the folder was listed
            (ledger / name_of(number)).unlink()


def _holder(path: Path) -> Record | None:
    """Who holds the folder by the newest file of `owner/`; None once it has left or is dead."""
    first: bytes | None = None
    for _ in range(
        int(DEAD_SECONDS / _POLL_SECONDS)
    ):  # not a deadline, so that a watcher that was itself stopped has not watched
        try:
            content = path.read_bytes() if path.is_file() or not path.exists() else b""
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        record = _read(path)
        if record is not None:
            if record.left or record.dead:
                return None
            if record.dead is False or first not in (None, content):
                return record
        if first is None:
            first = content
            who = f"a process that {path.name} does not name yet" if record is None else words(record)
            log.warning("%s may be in use by %s: watching for up to %d s whether it lives", path.parent.parent, who, DEAD_SECONDS)
        time.sleep(_POLL_SECONDS)
    return None


def _numbers(ledger: Path) -> list[int]:

    try:
        return sorted(int(path.stem) for path in ledger.iterdir() if NAMES.fullmatch(path.name))
    except FileNotFoundError:
        return []


def name_of(number: int) -> str:
    """The file of an owner."""
    return f"{number:08d}.json"


def text_of(record: Record) -> str:
    """What its file holds."""
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def _read(path: Path) -> Record | None:
    """None while it is being written."""
    try:
        return codec.load(Record, path)
    except ValueError:
        return None


def words(record: Record) -> str:
    """Who it is, for a message."""
    return f"process {record.pid} on {record.host}"


def _whose(path: Path) -> str:
    record = _read(path)
    return "another process" if record is None else f"{words(record)} since {record.since}"


def this_process() -> Record:
    """A record of this process as the owner from now on."""
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Record(platform.node(), _machine(), os.getpid(), _born(os.getpid()) or "", since)


def _machine() -> str:
    try:
        boot = (_PROCESSES / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROCESSES / 'self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _born(pid: int) -> str | None:
    """When a process of this machine began, in the system's own count; None where there is none (or one that only waits to be reaped)."""
    try:
        state, *fields = (_PROCESSES / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError):
        pass
    if (_PROCESSES / "self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _now() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine sleeps where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

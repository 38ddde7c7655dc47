"""The one owner of a run folder in a store, by the rules of `plait.train.run_folder.owner`: objects are created that only one can create."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

from plait.configs import codec
from plait.configs.files import parse_json
from plait.data.remote.store import Store, StoreError, StoreLost
from plait.train.run_folder.owner import (
    DEAD_SECONDS,
    NAMES,
    OWNER,
    FolderInUse,
    FolderLost,
    Record,
    name_of,
    text_of,
    this_process,
    words,
)

log = logging.getLogger("plait")

RENEW_SECONDS = 20.0
SURE_SECONDS = 45.0
"""So long after its last renewal an owner writes without looking whether it has been replaced."""
_POLL_SECONDS = 5.0


class Ownership:
    """A run folder in a store, taken by this process."""

    def __init__(self, store: Store):
        """Raises FolderInUse where it belongs to a process that lives, StoreError where it cannot be used, StoreLost without an answer."""
        self._store = store
        self._number, self._record = _take(store)
        self._sure = time.monotonic()
        self._lost: str | None = None
        self._renewing, self._left = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="remote owner")
        self._thread.start()

    def check(self) -> None:
        """Raises FolderLost when another owner has followed, as far as is known here."""
        if self._lost is not None:
            raise FolderLost(f"{self._store.address} {self._lost}; this process stops without writing anything more there")

    def assure(self) -> None:
        """As `check`, and asks where nothing was heard for long. Raises StoreLost where there is no answer."""
        if time.monotonic() - self._sure > SURE_SECONDS:
            self._renew()
        self.check()

    def leave(self, *, trace: bool) -> None:
        """Gives it up; without `trace` as if nobody had come."""
        self._left.set()
        self._thread.join()
        try:
            if trace or self._number > 1:
                self._renew(left=True)
            else:
                self._store.remove([_object(self._number)])
        except (StoreError, StoreLost) as error:
            log.warning("%s; who comes next there waits %d s", error, DEAD_SECONDS)

    def _run(self) -> None:
        while not self._left.wait(RENEW_SECONDS):
            try:
                self._renew()
            except (StoreError, StoreLost) as error:
                log.debug("%s", error)

    def _renew(self, *, left: bool = False) -> None:
        with self._renewing:
            if self._lost is not None:
                return
            newest = max(_numbers(self._store), default=None)
            there = None if newest is None else _read(self._store, newest)
            if newest is None:
                self._lost = "is gone"
            elif newest != self._number or (there is not None and there.whose != self._record.whose):
                self._lost = f"now belongs to {'another process' if there is None else f'{words(there)} since {there.since}'}"
            else:
                self._record = dataclasses.replace(self._record, beat=self._record.beat + 1, left=left)
                self._store.write(_object(self._number), text_of(self._record).encode())
                self._sure = time.monotonic()


def _take(store: Store) -> tuple[int, Record]:
    while True:
        numbers = _numbers(store)
        last = max(numbers, default=0)
        if last and (holder := _holder(store, last)) is not None:
            raise FolderInUse(
                f"out={str(store.address)!r} is in use: {words(holder)} trains there since {holder.since}; wait until it has ended, "
                "end it, or use another --out"
            )
        number, record = last + 1, this_process()
        store.create(_object(number), text_of(record).encode())
        if max(_numbers(store), default=0) == number and _read(store, number) == record:
            store.remove([_object(earlier) for earlier in numbers])
            return number, record


def _holder(store: Store, number: int) -> Record | None:
    """Who holds the folder by an object of `owner/`; None once it has left or is dead."""
    first: bytes | None = None
    for _ in range(int(DEAD_SECONDS / _POLL_SECONDS) + 1):
        content = store.read(_object(number))
        if content is None:
            return None
        record = _parsed(content)
        if record is not None:
            if record.left or record.dead:
                return None
            if record.dead is False or first not in (None, content):
                return record
        if first is None:
            first = content
            who = "a process" if record is None else words(record)
            log.warning("%s may be in use by %s: watching for up to %d s whether it lives", store.address, who, DEAD_SECONDS)
        time.sleep(_POLL_SECONDS)
    return None


def _numbers(store: Store) -> list[int]:
    return sorted(int(name.partition(".")[0]) for name in store.names(OWNER) if NAMES.fullmatch(name))


def _object(number: int) -> str:
    return f"{OWNER}/{name_of(number)}"


def _read(store: Store, number: int) -> Record | None:
    content = store.read(_object(number))
    return None if content is None else _parsed(content)


def _parsed(content: bytes) -> Record | None:
    try:
        return codec.decode(Record, parse_json(content))
    except ValueError:
        return None

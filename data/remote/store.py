"""The objects under an address. Whatever fails for a while is tried again; what will not mend is said at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plait.data.remote.address import PACKAGES, Address

log = logging.getLogger("plait.data")

PATIENCE = 300.0
"""Seconds for which an object is tried."""
_LONGEST_REST = 15.0
_SAY_SECONDS = 10.0
_AT_ONCE = 8
_PART = 32 << 20
"""Bytes of an object that are asked for at once."""
_LARGE = 64 << 20
"""From this size on an object is written in parts, each of which is tried again alone."""
_OF_A_PART = 3
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
    "GatedRepoError",
    "LocalTokenNotFoundError",
)
_BUCKET = "bucket does not exist"
_SIGNING = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}


class StoreError(ValueError):
    """A store that cannot be used as asked: no package, no credentials, nothing there."""


class StoreLost(OSError):
    """A store that has not answered, or has answered with errors, for as long as it was tried."""


@dataclasses.dataclass(frozen=True)
class Object:
    """What is known of an object without reading it."""

    size: int
    version: str
    """Another one where the content has changed."""


class Store:
    """What lies under an address. May be used by several threads.

    Raises:
        StoreError: the package for it is not installed.
    """

    def __init__(self, address: Address, field: str, *, patience: float = PATIENCE):
        """Args: `field` is the option that named the address, for errors; `patience` seconds are how long an object is tried."""
        self.address, self.patience = address, patience
        self._what = f"{field}={str(address)!r}"
        self._files = _file_system(address.scheme, self._what)
        self._given_up = threading.Event()

    def objects(self, under: str = "") -> dict[str, Object]:
        """The objects under the address, or under the name `under` in it, by their names there; of an object itself the name is empty."""
        root = self._path(under)

        def found() -> dict[str, Any]:
            try:
                return dict(self._files.find(root, detail=True))
            except FileNotFoundError as error:
                if _BUCKET in str(error).lower():
                    raise
                return {}

        there = {}
        for path, info in self._tried("listed", found).items():
            if info.get("type") == "file" and not path.endswith("/") and (path == root or path.startswith(root + "/")):
                name = path.removeprefix(self.address.path).removeprefix("/")
                there[name] = Object(int(info["size"]), _version(info))
        return there

    def names(self, under: str) -> list[str]:
        """What lies in a folder, which may be named without asking for more."""

        def found() -> list[str]:
            try:
                return [str(path).rpartition("/")[2] for path in self._files.ls(self._path(under), detail=False, refresh=True)]
            except FileNotFoundError:
                return []

        return self._tried("listed", found)

    def read(self, name: str) -> bytes | None:
        """The bytes of a small object; None where there is none."""

        def found() -> bytes | None:
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._tried("read", found)

    def fetch(self, name: str, path: Path, known: Object) -> None:
        """Makes `path` the file of an object, all of it or nothing, in ranges.

        Raises:
            FileNotFoundError: there is none any more, or it is another by now.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with partial.open("wb") as file:
                file.truncate(known.size)
                descriptor = file.fileno()

                def part(begin: int) -> None:
                    end = min(begin + _PART, known.size)
                    data = self._tried("read", lambda: self._range(name, begin, end))
                    os.pwrite(descriptor, data, begin)

                self.each(part, range(0, known.size, _PART))
            now = self._tried("read", lambda: self._info(name))
            if now != known:
                raise FileNotFoundError(f"{self.address / name} has changed while it was read")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Makes an object of bytes."""
        self._tried("written", lambda: self._files.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Makes an object where there is none, which only one of several can; whether it was this one, as far as the answer says."""

        def made() -> bool:
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if "Precondition" not in str(error) and "ConditionalRequestConflict" not in str(error):
                    raise
                return False
            return True

        return self._tried("written", made)

    def upload(self, name: str, path: Path) -> None:
        """Makes an object of a file, and looks whether all of it is there.

        Raises:
            FileNotFoundError: the file is gone.
        """
        size = path.stat().st_size
        if size < _LARGE:
            data = path.read_bytes()
            return self.write(name, data)

        def put() -> None:
            large = _file_system(
                self.address.scheme, self._what, in_parts=True
            )  # a part that fails must not begin all of it anew
            large.put_file(str(path), self._path(name))
            if (found := self._info(name).size) != size:
                raise OSError(f"{self.address / name} has {found} bytes of {size}")

        self._tried("written", put)
        return None

    def remove(self, names: Collection[str]) -> None:
        """Removes objects, of which some may be gone."""

        def one(name: str) -> None:
            def gone() -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

            self._tried("removed", gone)

        self.each(one, names)

    def give_up(self) -> None:
        """Lets what is being tried fail at once."""
        self._given_up.set()

    def go_on(self) -> None:
        """Undoes `give_up`."""
        self._given_up.clear()

    def _path(self, name: str) -> str:
        return f"{self.address.path}/{name}" if name else self.address.path

    def _info(self, name: str) -> Object:
        info = (
            self._files.info(self._path(name), refresh=True)
            if self.address.scheme == "s3"
            else self._files.info(self._path(name))
        )
        return Object(int(info["size"]), _version(info))

    def _range(self, name: str, begin: int, end: int) -> bytes:
        data = self._files.cat_file(self._path(name), start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"{len(data)} bytes came of {end - begin}")
        return data

    def each(self, function: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Calls `function` for each item, several at a time, and raises what the first that failed has raised."""
        items = list(items)
        if len(items) < 2:
            for item in items:
                function(item)
            return
        with ThreadPoolExecutor(min(_AT_ONCE, len(items)), "store") as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _tried(self, done: str, function: Callable[[], Any]) -> Any:
        """What `function` gives, called again after rests that grow, until the patience is over."""
        begun, said, rest = time.monotonic(), False, 0.2
        while True:
            try:
                return function()
            except FileNotFoundError as error:
                if _BUCKET in str(error).lower():
                    raise StoreError(f"{self._what}: there is no such bucket; make it, or correct the name") from error
                raise
            except Exception as error:  # of the many kinds that each package has of its own
                if (hopeless := self._hopeless(error)) is not None:
                    raise StoreError(f"{self._what} cannot be {done}: {hopeless}") from error
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                spent = time.monotonic() - begun
                if spent + rest > self.patience or self._given_up.is_set():
                    raise StoreLost(f"{self._what} cannot be {done}, after {spent:.0f} s of trying: {why}") from error
                if spent > _SAY_SECONDS and not said:
                    log.warning("%s cannot be %s (%s); trying for up to %.0f s", self.address, done, why, self.patience)
                    said = True
            self._given_up.wait(rest * random.uniform(0.5, 1))
            rest = min(2 * rest, _LONGEST_REST)

    def _hopeless(self, error: Exception) -> str | None:
        """Why trying again is of no use."""
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & set(_NO_CREDENTIALS):
            return f"there are no credentials for it; {_SIGNING[self.address.scheme]}"
        if isinstance(error, PermissionError):
            return f"the credentials do not allow it ({str(error)[:200]}); {_SIGNING[self.address.scheme]} to those that do"
        if isinstance(error, NotImplementedError | TypeError | AttributeError):
            return f"{PACKAGES[self.address.scheme]} cannot ({type(error).__name__}: {str(error)[:200]}); pip install -U 'plait[remote]'"
        return None


def _file_system(scheme: str, what: str, *, in_parts: bool = False) -> Any:
    package = PACKAGES[scheme]
    try:
        importlib.import_module("fsspec")
        importlib.import_module(package)
    except ImportError as error:
        raise StoreError(
            f"{what} needs the package {error.name or package}, which is not installed; pip install 'plait[remote]'"
        ) from error
    logging.getLogger(package).setLevel(logging.ERROR)
    signing = tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "HF_"))))
    return _connected(scheme, in_parts, os.getpid(), signing)


@functools.lru_cache(maxsize=8)
def _connected(scheme: str, in_parts: bool, process: int, signing: tuple[tuple[str, str], ...]) -> Any:
    """One for all stores of a scheme, as making one takes long; another in another process or with other settings."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme != "s3":
        return fsspec.filesystem(scheme, **options)
    retries = {"total_max_attempts": _OF_A_PART if in_parts else 1, "mode": "standard"}
    options["config_kwargs"] = {"retries": retries, "connect_timeout": 10, "read_timeout": 30}
    files = fsspec.filesystem(scheme, **options)
    if not in_parts:
        files.retries = 1  # requests are tried again here, where it is said for how long
    return files


def _version(info: dict[str, Any]) -> str:
    """What changes with the content of an object, whichever store says it."""
    for key in ("ETag", "etag", "generation", "blob_id", "md5Hash", "sha"):
        if info.get(key):
            return str(info[key]).strip('"')
    return str(info.get("LastModified") or info.get("mtime") or info.get("updated") or info["size"])

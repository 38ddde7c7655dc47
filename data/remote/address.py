"""Addresses such as `s3://bucket/folder`, and the folders of this machine that stand for them. Needs nothing but the standard library."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""What speaks with the stores of each scheme."""
_FORM = re.compile(r"([a-z][a-z0-9+.-]*):/{1,2}([^/].*)", re.DOTALL)
_VARIABLE = "PLAIT_CACHE"


class AddressError(ValueError):
    """No address of a store that is known."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A place in a store."""

    scheme: str
    path: str
    """Bucket and key, with no slash around."""

    @classmethod
    def of(cls, text: str | Path) -> Address | None:
        """The address that a text, or a path made of one (which lost a slash), is; None for a path of this machine.

        Raises:
            AddressError: it has the form of an address, and no store that is known.
        """
        found = _FORM.fullmatch(str(text))
        if found is None or (len(found[1]) > 1 and found[1] not in PACKAGES and "://" not in str(text)):
            return None
        scheme, parts = found[1], [part for part in found[2].split("/") if part]
        if scheme not in PACKAGES:
            raise AddressError(
                f"{str(text)!r} is in no store that is known; use {', '.join(f'{name}://' for name in PACKAGES)} or a path"
            )
        if {".", ".."} & set(parts):
            raise AddressError(f"{str(text)!r} has '.' or '..' in it; write the place out")
        return cls(scheme, "/".join(parts))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> Address:
        return Address(self.scheme, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """What it lies in."""
        return Address(self.scheme, self.path.rpartition("/")[0])

    @property
    def written(self) -> Path:
        """The folder of this machine from which it is written."""
        return cache() / "written" / self.scheme / self.path

    @property
    def read(self) -> Path:
        """The file or folder of this machine through which it is read."""
        return cache() / "read" / self.scheme / self.path

    @property
    def opened(self) -> Path:
        """The folder of this machine through which a run there is read, with some of its checkpoints."""
        return cache() / "opened" / self.scheme / self.path


def cache() -> Path:
    """The folder of this machine for what lies elsewhere: PLAIT_CACHE, else `plait` in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get(_VARIABLE):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "plait"


def stood_for(path: Path) -> Address | None:
    """The address for which a file in the folder of an opened run stands; None for any other."""
    try:
        scheme, *key = path.absolute().relative_to(cache() / "opened").parts
    except ValueError:
        return None
    return Address(scheme, "/".join(key))


def written(text: str | Path) -> Path:
    """The folder in which this machine writes what is to lie at a path or address."""
    address = Address.of(text)
    return Path(text) if address is None else address.written

"""The layout of a GGUF file: metadata, and where each tensor lies. Nothing in it is believed before it is known to fit the file.

Source: the GGUF specification of the ggml project (version 3).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plait.models.hf.transforms import Shape
from plait.train.convert.weights import ConvertError

MAGIC = b"GGUF"
VERSIONS = (2, 3)


class TensorType(NamedTuple):
    """How the entries of a tensor are kept: in blocks of a number of bytes each."""

    name: str
    block: int
    """Entries."""
    size: int
    """Bytes."""


TYPES = {
    number: TensorType(name, block, size)
    for number, name, block, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}
"""Of tensors, by their numbers in files."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values in the metadata, as `struct` names them."""
_TEXT, _ARRAY = 8, 9
_MOST_DIMS = 4


class Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: Shape
    """The outermost axis first."""
    type: TensorType
    start: int
    """Its first byte in the file."""
    size: int
    """Bytes."""


class GGUFFile:
    """The metadata and the tensors of a file; reads no tensor until `bytes_of`."""

    def __init__(self, path: Path):
        """Raises ConvertError: no GGUF file, of another version, cut short, or one that contradicts itself."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConvertError(f"{path} cannot be read ({error}); download it again") from None
        self._at = 0
        if self._take(4) != MAGIC:
            raise ConvertError(
                f"{path} is no GGUF file: it does not start with {MAGIC.decode()}; give one, or the folder of a published model"
            )
        if (version := self._number("I")) not in VERSIONS:
            kind = "big-endian" if version > 0xFFFF else f"of version {version}"
            raise ConvertError(
                f"{path} is {kind}; little-endian files of version {' or '.join(map(str, VERSIONS))} can be read: convert the model again"
            )
        tensors, values = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._text()
            if key in self.metadata:
                raise self._broken(f"has {key!r} twice")
            self.metadata[key] = self._value(self._number("I"))
        self.entries = list(self._entries(tensors))

    def bytes_of(self, entry: Entry) -> np.ndarray:
        """What is kept of a tensor."""
        return np.frombuffer(self._data, np.uint8, entry.size, entry.start)

    def _entries(self, count: int) -> Iterator[Entry]:
        found = []
        for _ in range(count):
            name, dims = self._text(), self._number("I")
            if dims > _MOST_DIMS:
                raise self._broken(f"gives {name!r} {dims} axes")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            kind, start = self._number("I"), self._number("Q")
            if kind not in TYPES:
                raise ConvertError(
                    f"{self.path} keeps {name!r} in the type {kind}, which is not known here; give an F16 or Q8_0 file"
                )
            found.append((name, shape, TYPES[kind], start))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"has general.alignment={alignment!r}")
        first = -(-self._at // alignment) * alignment
        for name, shape, kind, start in found:
            if shape and shape[-1] % kind.block:
                raise self._broken(f"keeps {name!r} {list(shape)} in blocks of {kind.block}, which its rows are not")
            size = math.prod(shape) // kind.block * kind.size
            if first + start + size > len(self._data):
                raise self._broken(f"is cut short: {name!r} {list(shape)} ends behind its end")
            yield Entry(name, shape, kind, first + start, size)

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return _plain(self._number(_NUMBERS[kind]), kind)
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner == _TEXT:
                return [self._text() for _ in range(count)]
            if inner in _NUMBERS:
                width = struct.calcsize(_NUMBERS[inner])
                values = struct.unpack(f"<{count}{_NUMBERS[inner]}", self._take(count * width))
                return [_plain(value, inner) for value in values]
            kind = inner
        raise self._broken(f"has a value of type {kind}")

    def _text(self) -> str:
        content = self._take(self._number("Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"has a text that is not UTF-8: {content[:40]!r}") from None

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(kind)))[0]

    def _take(self, size: int) -> bytes:
        """The next bytes; a length of the file's is compared with what is left before anything is made of it."""
        if size > len(self._data) - self._at:
            raise self._broken(f"is cut short: at byte {self._at} it says that {size} more follow, and it has {len(self._data)}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _broken(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path} {what}; download it again")


def _plain(value: Any, kind: int) -> Any:
    """A float32 as the shortest decimal that has it: 1e-05, as configs do, and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if _NUMBERS[kind] == "f" else value

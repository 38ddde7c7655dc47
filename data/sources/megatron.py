"""Tokens as Megatron-LM keeps them: NAME.bin holds the ids, NAME.idx says where sequences and documents begin.

    magic MMIDIDX, version 1 (8 bytes), code of the ids' type (1), sequences S (8), document ends D (8),
    lengths int32 [S], first byte of each int64 [S], first sequence of each document and their end int64 [D]

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plait.data.config import DataError

_MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class _Index(NamedTuple):
    dtype: np.dtype
    lengths: np.ndarray
    """int32 [S], ids."""
    begins: np.ndarray
    """int64 [S], bytes."""
    first: np.ndarray
    """int64 [D], sequences."""


def documents(file: Path, span: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """The ids of each document of NAME.idx, or of those numbered in the span, [n].

    Raises:
        DataError: not such a pair of files, or not whole.
        OSError: it cannot be read.
    """
    index = _read(file)
    ids = np.memmap(_ids_of(file), index.dtype, "r") if index.lengths.sum() else np.zeros(0, index.dtype)
    for number in range(*(span or (0, len(index.first) - 1))):
        sequences = range(*index.first[number : number + 2])
        begins = (index.begins[i] // index.dtype.itemsize for i in sequences)
        parts = [ids[begin : begin + index.lengths[i]] for begin, i in zip(begins, sequences)]
        yield np.concatenate(parts) if parts else np.zeros(0, index.dtype)


def document_bytes(file: Path) -> np.ndarray:
    """The size of each document, int64 [D - 1]."""
    index = _read(file)
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(ends[index.first]) * index.dtype.itemsize


def _ids_of(file: Path) -> Path:
    return file.with_suffix(".bin")


def _read(file: Path) -> _Index:
    raw = file.read_bytes()
    bad = DataError(f"{file} is not a whole index of Megatron-LM; write it again, or take it away")
    if len(raw) < _HEAD.size:
        raise bad
    magic, version, code, sequences, documents = _HEAD.unpack_from(raw)
    if magic != _MAGIC or version != 1 or len(raw) != _HEAD.size + 12 * sequences + 8 * documents or documents < 1:
        raise bad
    if code not in _DTYPES:
        raise DataError(f"{file} holds numbers of type {code}, which are no ids; give one with whole numbers")
    lengths = np.frombuffer(raw, "<i4", sequences, _HEAD.size)
    begins = np.frombuffer(raw, "<i8", sequences, _HEAD.size + 4 * sequences)
    first = np.frombuffer(raw, "<i8", documents, _HEAD.size + 12 * sequences)
    dtype = np.dtype(_DTYPES[code])
    if first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any() or (lengths < 0).any() or (begins < 0).any():
        raise bad
    if not _ids_of(file).exists():
        raise DataError(f"{file} needs {_ids_of(file).name} beside it, which is not there; put it there, or take this away")
    end, there = int((begins + lengths * dtype.itemsize).max(initial=0)), _ids_of(file).stat().st_size
    if end > there:
        raise DataError(f"{_ids_of(file)} has {there} bytes of the {end} that {file.name} names; write both again")
    return _Index(dtype, lengths, begins, first)

"""The rows of shards: each from its number alone, without a look at more than a few shards.

An epoch goes through the shards in an order of its own, a window of neighbours in that order at a time. In a window the documents of
each shard are put in another order and packed, and the rows of all its shards are read in another order again. All orders are functions of
hashes, seed and epoch. So memory is that of two windows' indices, and reading keeps to a window's files, however large the corpus.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.corpus import INDEX, sha256_of
from plait.data.packing import Documents, Packing, shuffled_order
from plait.data.shards.prepared import Prepared
from plait.data.shards.shard import damaged, name_of
from plait.data.splitmix import salted
from plait.data.tokenizers.tokenizer import Tokenizer

WINDOW_TOKENS = 1 << 31
"""Tokens of a window, about: rows are far apart in the text that are near in time, and its index fits into memory."""
_CIRCLE = 1 << 64


@dataclass(frozen=True)
class Arc:
    """Documents whose hash lies in a part of the circle of all hashes: those held out, or all others.

    So a document is on the same side whatever else there is, and so are its copies.
    """

    begin: int
    length: int

    @staticmethod
    def held_out(share: float, seed: int) -> Arc:
        """The part that is held out, of all tokens `share` on average."""
        return Arc(int(salted(np.zeros(1, np.uint64), "split", seed)[0]), round(share * _CIRCLE))

    @staticmethod
    def everything() -> Arc:
        """All documents."""
        return Arc(0, _CIRCLE)

    @property
    def others(self) -> Arc:
        """The rest."""
        return Arc((self.begin + self.length) % _CIRCLE, _CIRCLE - self.length)

    def ranges(self, hashes: np.ndarray) -> list[tuple[int, int]]:
        """Which of the ascending hashes, `uint64 [D]`, lie in it, as ranges of indices."""
        place = lambda at: bisect.bisect_left(
            range(len(hashes)), at, key=lambda i: int(hashes[i])
        )  # NumPy's would copy the column
        end = self.begin + self.length
        spans = [(self.begin, end)] if end <= _CIRCLE else [(0, end - _CIRCLE), (self.begin, _CIRCLE)]
        found = [(place(first), place(stop)) for first, stop in spans]
        return [(first, stop) for first, stop in found if first < stop]


class ShardRows:
    """The rows of the documents of some shards that lie in an arc, in an order that differs from epoch to epoch.

    Args:
        prepared: the shards.
        arc: which of their documents.
        config: `seq_len`, `document_start`, `seed`.
        tokenizer: start and end tokens.
        name: salt of the order.
    """

    def __init__(self, prepared: Prepared, arc: Arc, config: DataConfig, tokenizer: Tokenizer, name: str) -> None:
        self._prepared, self._arc, self._salt, self._seq_len = prepared, arc, (name, config.seed), config.seq_len
        self._start_id = tokenizer.bos_id if config.document_start else None
        self._end_id = tokenizer.eos_id
        sizes = [self._size(number) for number in range(len(prepared.meta.shards))]
        self.num_documents, self.num_tokens = (sum(column) for column in zip(*sizes))
        self.num_targets = self.num_tokens + (self.num_documents if config.document_start else 0)
        extra = 1 if config.document_start else 0
        self._rows = np.array([-(-(tokens + extra * documents) // config.seq_len) for documents, tokens in sizes], np.int64)
        self.num_rows = int(self._rows.sum())
        self._at_once = max(1, round(WINDOW_TOKENS * len(sizes) / max(prepared.meta.num_tokens, 1)))
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def read(self, index: np.ndarray) -> Batch:
        """The rows with these ascending numbers, counted from the first row of the first epoch on, [R, T]."""
        parts = []
        for epoch in np.unique(index // self.num_rows).tolist():
            within = index[index // self.num_rows == epoch] % self.num_rows
            _, ends = self._epoch(epoch)
            window = np.searchsorted(ends, within, side="right")
            for number in np.unique(window).tolist():
                begin = ends[number - 1] if number else 0
                parts.append(self._window(epoch, number).rows(within[window == number] - begin))
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def _size(self, number: int) -> tuple[int, int]:
        """Documents and tokens of a shard that lie in the arc."""
        _, index = self._prepared.open(number, tokens=False)
        ends, ranges = index["end"], self._arc.ranges(index["hash"])
        tokens = sum(int(ends[stop - 1]) - (int(ends[first - 1]) if first else 0) for first, stop in ranges)
        return sum(stop - first for first, stop in ranges), tokens

    def _make_epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each window, and one past the last row of each."""
        order = shuffled_order(np.arange(len(self._rows)), *self._salt, "shards", epoch)
        windows = np.split(order, range(self._at_once, len(order), self._at_once))
        return windows, np.cumsum([self._rows[shards].sum() for shards in windows])

    def _make_window(self, epoch: int, number: int) -> _Window:
        windows, _ = self._epoch(epoch)
        salt = (*self._salt, epoch)
        packed = [self._pack(int(shard), salt) for shard in windows[number] if self._rows[shard]]
        return _Window(packed, (*salt, "rows", number))

    def _pack(self, number: int, salt: tuple[object, ...]) -> Packing:
        documents = self._documents(number)
        documents = documents.take(shuffled_order(documents.hashes, *salt, "documents"))
        return Packing(documents, seq_len=self._seq_len, start_id=self._start_id, end_id=self._end_id)

    def _documents(self, number: int) -> Documents:
        """Those of a shard that lie in the arc. Raises DataError where its index is not what was written."""
        tokens, index = self._prepared.open(number)
        folder = self._prepared.folder / name_of(number)
        if sha256_of(folder / INDEX) != self._prepared.meta.shards[number].index_sha256:
            raise damaged(folder, f"{INDEX} has changed")
        pick = np.concatenate([np.arange(first, stop) for first, stop in self._arc.ranges(index["hash"])])
        ends = index["end"].astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        given = index["given"][pick] if "given" in (index.dtype.names or ()) else None
        return Documents(tokens, (ends - lengths)[pick], lengths[pick], index["hash"][pick].astype(np.uint64), given)


class _Window:
    """The rows of some packed shards, in another order."""

    def __init__(self, packed: list[Packing], salt: tuple[object, ...]) -> None:
        self._packed = packed
        self._ends = np.cumsum([one.num_rows for one in packed])
        self._order = shuffled_order(np.arange(self._ends[-1]), *salt)

    def rows(self, index: np.ndarray) -> Batch:
        """The rows with these numbers in the order of the window."""
        wanted = self._order[index]
        shard = np.searchsorted(self._ends, wanted, side="right")
        order = np.argsort(shard, kind="stable")
        parts = []
        for number in np.unique(shard).tolist():
            begin = self._ends[number - 1] if number else 0
            parts.append(self._packed[number].rows(wanted[order][shard[order] == number] - begin))
        back = np.argsort(order, kind="stable")
        return Batch(*(np.concatenate(arrays)[back] for arrays in zip(*parts)))

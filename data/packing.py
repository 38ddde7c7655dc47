"""Documents cut into rows without loss: every token is predicted exactly once an epoch, and never from another document.

A document of tokens x1 ... xn is read as pairs (input, target):

    with a start token:  (start, x1) (x1, x2) ... (xn, end)        n + 1 pairs, every token predicted
    without:                         (x1, x2) ... (xn, end)        n pairs, x1 is given

The pairs of all documents, in the epoch's order, form one stream, and row r holds pairs r T ... r T + T - 1. A document that
crosses the edge of a row goes on in the next as a new piece: its first target there is the one that follows the last target
here. Only the last row of an epoch is padded.

Of a document with a prompt the targets that are the prompt's do not count, nor do those in a piece that goes on in another row than that
with the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plait.data.batch import Batch
from plait.data.splitmix import salted


@dataclass(frozen=True)
class Documents:
    """Some documents of a corpus: document d is `tokens[starts[d] : starts[d] + lengths[d]]`.

    Args:
        tokens: unsigned integers [N], often memory-mapped; the whole corpus.
        starts: int64 [D].
        lengths: int64 [D], at least 1 each.
        hashes: uint64 [D], of the text; they decide every order, so that no generator's stream does.
        given: int64 [D], tokens at the beginning that are a prompt; None where no document has one.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    given: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens in these documents, start and end tokens not counted."""
        return int(self.lengths.sum())

    def num_bytes(self, bytes_per_token: np.ndarray) -> int:
        """Bytes of text in these documents, counted token by token."""
        return sum(
            int(bytes_per_token[self.tokens[start : start + length]].sum()) for start, length in zip(self.starts, self.lengths)
        )

    def take(self, order: np.ndarray) -> Documents:
        """The documents with these indices, in this order."""
        given = None if self.given is None else self.given[order]
        return Documents(self.tokens, self.starts[order], self.lengths[order], self.hashes[order], given)


def shuffled_order(hashes: np.ndarray, *salt: object) -> np.ndarray:
    """A permutation of `range(len(hashes))` that depends only on the hashes and the salt (equal hashes keep their order)."""
    return np.argsort(salted(hashes, *salt), kind="stable")


class Packing:
    """The rows of one epoch, each computed from its index.

    Memory is one int64 a document; a row costs a binary search and a gather, whatever the size of the corpus.

    Args:
        documents: in the order in which they are packed.
        seq_len: T, tokens in a row.
        start_id: the token before each document, or None for none.
        end_id: the target of a document's last token.
    """

    def __init__(self, documents: Documents, *, seq_len: int, start_id: int | None, end_id: int) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self.start_id = start_id
        self.end_id = end_id
        self._shift = 0 if start_id is None else 1
        self._begins = np.concatenate([[0], np.cumsum(documents.lengths + self._shift)])  # first pair of each document [D + 1]

    @property
    def num_pairs(self) -> int:
        """Predicted tokens in an epoch, end tokens counted."""
        return int(self._begins[-1])

    @property
    def num_rows(self) -> int:
        """Rows in an epoch; the last may end in padding."""
        return -(-self.num_pairs // self.seq_len)

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows with these indices, [B] -> arrays [B, T]; an index past the end gives a row of padding."""
        first = np.asarray(indices, np.int64)[:, None] * self.seq_len
        pair = first + np.arange(self.seq_len)  # [B, T], place in the epoch's stream
        real = pair < self.num_pairs
        pair = np.minimum(pair, self.num_pairs - 1)
        doc = np.searchsorted(self._begins, pair, side="right") - 1  # [B, T]
        begin = self._begins[doc]
        # Place of the target in its document; the input stands one before it, and -1 there is the start token.
        place = pair - begin + 1 - self._shift
        start, length = self.documents.starts[doc], self.documents.lengths[doc]
        read = self.documents.tokens
        tokens = read[start + np.maximum(place - 1, 0)].astype(np.int32)
        targets = read[start + np.minimum(place, length - 1)].astype(np.int32)
        if self.start_id is not None:
            tokens = np.where(place == 0, np.int32(self.start_id), tokens)
        targets = np.where(place == length, np.int32(self.end_id), targets)
        counts = real
        if self.documents.given is not None:
            given = self.documents.given[doc]
            counts = real & (place >= given) & ((begin >= first) | (given == 0))
        return Batch(
            tokens=np.where(real, tokens, 0),
            targets=np.where(real, targets, 0),
            segment_ids=np.where(real, doc - doc[:, :1] + 1, 0).astype(np.int32),
            positions=np.where(real, pair - np.maximum(begin, first), 0).astype(np.int32),
            loss_mask=counts.astype(np.float32),
        )

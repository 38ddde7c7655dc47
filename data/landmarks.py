"""Landmark tokens: after every so many tokens of a document one with an id of its own, which stands for the block that it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.data.batch import Batch


@dataclass(frozen=True)
class Landmarks:
    """Where landmarks stand: at places `every - 1`, `2 every - 1`, ... of each document of a row (2305.16300, section 3).

    Args:
        every: tokens of a block, the landmark included; at least 2.
        token: the landmark's id.
    """

    every: int
    token: int

    def room(self, seq_len: int) -> int:
        """Tokens of rows without landmarks that fit into rows of `seq_len` with them, however many documents share a row."""
        return seq_len - (seq_len + 1) // self.every

    def into_rows(self, batch: Batch, seq_len: int) -> Batch:
        """Rows of `room(seq_len)` tokens with the landmarks put in, [B, seq_len].

        A landmark takes over the target of the token before it, which has none then: nothing has to say where landmarks stand, and every
        token is still predicted once. What is left of a row is padding.
        """
        real = batch.segment_ids > 0
        ends = real & ((batch.positions + 1) % (self.every - 1) == 0)
        place = np.arange(batch.tokens.shape[1]) + np.cumsum(ends, axis=1) - ends  # where each token goes
        row = np.arange(len(place))[:, None]

        def spread(array: np.ndarray, at_landmark: np.ndarray) -> np.ndarray:
            out = np.zeros((len(array), seq_len), array.dtype)
            out[np.broadcast_to(row, place.shape)[real], place[real]] = array[real]
            out[np.broadcast_to(row, place.shape)[ends], place[ends] + 1] = at_landmark[ends]
            return out

        positions = batch.positions + batch.positions // (self.every - 1)
        kept = np.where(ends, 0, 1)
        return Batch(
            tokens=spread(batch.tokens, np.full_like(batch.tokens, self.token)),
            targets=spread((batch.targets * kept).astype(batch.targets.dtype), batch.targets),
            segment_ids=spread(batch.segment_ids, batch.segment_ids),
            positions=spread(positions.astype(batch.positions.dtype), (positions + 1).astype(batch.positions.dtype)),
            loss_mask=spread((batch.loss_mask * kept).astype(batch.loss_mask.dtype), batch.loss_mask),
        )

    def into_text(self, ids: Sequence[int]) -> list[int]:
        """The ids of the beginning of a document with the landmarks put in."""
        step = self.every - 1
        cut = [list(ids[start : start + step]) for start in range(0, len(ids), step)]
        return [one for block in cut for one in (*block, *([self.token] if len(block) == step else []))]

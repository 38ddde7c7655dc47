"""Masked language modelling: some tokens of the text are hidden, and each is to be named from both sides.

tokens    the  [M]  sat  on   [M]  mat        [M] for 80% of the chosen ones, any id for 10%, the token itself for 10%
targets    .   cat   .   .    the   .         the token that was there; nothing elsewhere
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Number
from plait.data.tasks.base import TASKS, Task
from plait.data.tasks.draws import Draws

if TYPE_CHECKING:
    from plait.data.batch import Batch
    from plait.data.config import DataConfig
    from plait.data.loader import Data, Reading, ReadRows

Chosen = Annotated[float, Number(above=0, least=1e-3, most=0.9)]


@TASKS.register("mlm", source="BERT (1810.04805); shares of MosaicBERT (2312.17482)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLanguageTask(Task):
    """Text of which some tokens are hidden: the loss of the hidden ones, and the share that is named rightly.

    The mask is one id more than the tokenizer has. In each row at least one token is chosen; a document's start token never is.
    """

    reads_text = True
    leaks_to_the_past = False
    extra_ids = 1

    mask_share: Chosen = 0.3
    """Share of the tokens chosen in training."""
    val_mask_share: Chosen = 0.15
    """The same in validation."""

    def vocabulary(self, data: DataConfig) -> int | None:
        return None if data.tokenizer_size is None else data.tokenizer_size + self.extra_ids

    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        from plait.data.text import open_text

        text = open_text(data, folder, rows, reading)
        start = None if text.tokenizer is None or not data.document_start else text.tokenizer.bos_id
        hidden = lambda read, stream, share: functools.partial(
            self._read, read, share, text.vocab_size, start, (self.name, data.seed, stream)
        )
        return dataclasses.replace(
            text,
            vocab_size=text.vocab_size + self.extra_ids,
            read_train=hidden(text.read_train, "train", self.mask_share),
            read_val=hidden(text.read_val, "val", self.val_mask_share),
            identity={"task": self.name, "task.mask_share": self.mask_share, **text.identity},
        )

    def _read(
        self, read: ReadRows, share: float, mask: int, start: int | None, salt: tuple[object, ...], index: np.ndarray
    ) -> Batch:
        batch = read(index)
        draws, length = Draws(index, *salt), batch.tokens.shape[1]
        lots = np.where(
            (batch.segment_ids > 0) & ((batch.tokens != start) | (batch.positions > 0)), draws.uniform(length), np.inf
        )
        chosen = (lots < share) | ((lots == lots.min(1, keepdims=True)) & (lots < np.inf))
        fate, other = draws.uniform(length), draws.integers(mask, length)
        shown = np.where(fate < 0.8, mask, np.where(fate < 0.9, other, batch.tokens))
        return batch._replace(
            tokens=np.where(chosen, shown, batch.tokens).astype(np.int32),
            targets=np.where(chosen, batch.tokens, 0).astype(np.int32),
            loss_mask=chosen.astype(np.float32),
        )

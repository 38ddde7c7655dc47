"""What a task is: rows to train on and to be scored by, and the scores."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from plait.configs.components import Component, Registry

if TYPE_CHECKING:
    from plait.data.batch import Batch
    from plait.data.config import DataConfig
    from plait.data.landmarks import Landmarks
    from plait.data.loader import Data, Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Component, abc.ABC):
    """What a run trains on (`data.task`), or is evaluated on (`launch.py eval RUN --tasks NAME`)."""

    reads_text: ClassVar[bool] = False
    """Whether its rows are text, so that its runs have a tokenizer."""
    has_answers: ClassVar[bool] = True
    """Whether a target is an answer that is right or wrong, for `scores` to count."""
    counts_bytes: ClassVar[bool] = False
    """Whether its targets are all of a text, so that their loss is one per byte of it."""
    leaks_to_the_past: ClassVar[bool] = True
    """Whether its rows hold what is asked for at a later place, so that a model must be causal."""
    reads_bytes: ClassVar[bool] = False
    """Whether its ids are the bytes of a text, so that a run on text can be asked where its tokens are bytes too."""
    extra_ids: ClassVar[int] = 0
    """Ids of text beyond those of the tokenizer."""

    @abc.abstractmethod
    def vocabulary(self, data: DataConfig) -> int | None:
        """The number of ids that its rows are made of; None where only a file says."""

    @abc.abstractmethod
    def open(self, data: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
        """See `plait.data.loader.build_data`."""

    def landmarks(self, tokenizer_size: int) -> Landmarks | None:
        """The tokens that its rows have between those of the text, whose tokenizer has so many ids; None where they have none."""
        return None

    def fit(self, data: DataConfig) -> None:
        """Raises ValueError, in a message that begins with the field of this task, where the rows of `data` cannot hold it."""

    def require_causal(self, causal: bool) -> None:
        """Raises ValueError where a model that is not causal would see what is asked for."""
        if not causal and self.leaks_to_the_past:
            raise ValueError(
                f"model.causal=False lets a token see what data.task={self.name} asks of it; use data.task=mlm, or model.causal=True"
            )

    def scores(self, batch: Batch, nll: np.ndarray, right: np.ndarray) -> Mapping[str, tuple[float, float]]:
        """Named sums over a batch, each with what to divide its total by: here the share of the answers that are right.

        Args:
            batch: whole, of the held-out rows; rows without any loss mask are padding.
            nll: negative log-likelihood of each target in nats, float32 [B, T]; 0 off the loss mask.
            right: whether the target is the likeliest token, bool [B, T]; False off the loss mask.
        """
        return {"accuracy": (float(right.sum()), float(batch.loss_mask.sum()))}

    def distances(self, batch: Batch, likeliest: np.ndarray) -> Mapping[str, tuple[float, float]]:
        """Further sums as those of `scores`, of answers that are near or far rather than right or wrong; by default none.

        Args:
            batch: as in `scores`.
            likeliest: the likeliest token of each position, int [B, T], also of those off the loss mask.
        """
        return {}


TASKS: Registry[Task] = Registry("task", "plait.data.tasks", Task)

"""The vocabulary of an experiment whose data is not at hand."""

from __future__ import annotations

import dataclasses

from plait.configs.experiment import ExperimentConfig
from plait.data.config import BYTE_VOCAB


def with_vocabulary(config: ExperimentConfig, elsewhere: int | None = None) -> ExperimentConfig:
    """`config` with its vocabulary settled as its data will settle it.

    Args:
        elsewhere: stands for the size of a tokenizer that is in a file, where the model has no size of its own; None for nothing.

    Raises:
        ValueError: the size is in such a file only, or the model's is smaller than the data's.
    """
    data = config.data
    size = data.vocabulary() or config.model.vocab_size or elsewhere
    if size is None:
        raise ValueError(
            f"model.vocab_size=None is not known from data.tokenizer={data.tokenizer!r} here; give --model.vocab-size"
        )
    return dataclasses.replace(config, model=config.model.with_vocab(size))


def check_vocabulary(config: ExperimentConfig) -> None:
    """Raises ValueError where the model's vocabulary is smaller than any that the data can have, which needs no data to be known."""
    data, size = config.data, config.model.vocab_size
    trained = data.task.reads_text and data.tokenizer == "bpe"  # no larger than asked for, and holds all bytes
    least = BYTE_VOCAB if trained else data.task.vocabulary(data)
    if size is not None and least is not None:
        config.model.with_vocab(least)

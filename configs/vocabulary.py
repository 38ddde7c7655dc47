"""The vocabulary of an experiment whose data is not at hand."""

from __future__ import annotations

import dataclasses

from plait.configs.experiment import ExperimentConfig


def with_vocabulary(config: ExperimentConfig, elsewhere: int | None = None) -> ExperimentConfig:
    """`config` with its vocabulary settled as its data will settle it.

    Args:
        elsewhere: stands for the size of a tokenizer that is in a file, where the model has no size of its own; None for nothing.

    Raises:
        ValueError: the size is in such a file only, or the model's is smaller than the data's.
    """
    data = config.data
    size = data.task.vocabulary(data) or config.model.vocab_size or elsewhere
    if size is None:
        raise ValueError(
            f"model.vocab_size=None is not known from data.tokenizer={data.tokenizer!r} here; give --model.vocab_size"
        )
    return dataclasses.replace(config, model=config.model.with_vocab(size))

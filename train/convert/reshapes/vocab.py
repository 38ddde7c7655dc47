"""Another number of ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from plait.configs.domains import Vocabulary
from plait.train.convert.reshapes.base import Making, Reshape, Shapes, Subject, register
from plait.train.convert.weights import ConvertError

_AXES = {"embedding": 0, "head.kernel": 1, "layer_inputs.embedding": 0}
"""The axis of the ids."""


@register("vocab", source="Initializing New Word Embeddings for Pretrained Language Models (Hewitt, 2021)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocab(Reshape):
    """Embedding and head of another size; those of new ids are the mean of all there were. Logits of old ids stay."""

    vocab_size: Vocabulary | None = None
    """Rows of the embedding, at least the ids of the run's data; None gives these rounded up to a multiple of 128."""

    def model(self, subject: Subject):
        if self.vocab_size is not None and self.vocab_size < subject.num_ids:
            raise ConvertError(
                f"vocab_size={self.vocab_size} must hold the {subject.num_ids} ids of the run's data; use {subject.num_ids} or more"
            )
        return dataclasses.replace(subject.model, vocab_size=self.vocab_size).with_vocab(subject.num_ids)

    def outside(self, before: Shapes, after: Shapes) -> Iterator[Making]:
        for path, axis in _AXES.items():
            if path in before:
                yield Making((path,), (path,), lambda x, axis=axis, size=after[path][axis]: [resized(x, size, axis)])


def resized(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The first `size` entries along an axis, and beyond its end their mean."""
    mean = x.astype(np.float32).mean(axis, keepdims=True).astype(x.dtype)
    kept = np.take(x, np.arange(min(size, x.shape[axis])), axis)
    return np.concatenate([kept, np.repeat(mean, max(size - x.shape[axis], 0), axis)], axis)

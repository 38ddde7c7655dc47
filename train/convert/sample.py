"""The ids that a model is looked at on: of a text, or at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from plait.configs.experiment import ExperimentConfig
from plait.models.axes import BATCH
from plait.train.convert.weights import ConvertError
from plait.train.mesh import ways
from plait.train.run import Trained


def ids_of(path: Path, trained: Trained) -> np.ndarray:
    """The ids of a text."""
    if trained.tokenizer is None:
        raise ConvertError(f"text={str(path)!r} needs a run with a tokenizer, and this one was trained on ids; leave it out")
    try:
        ids = trained.tokenizer.encode(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"text={str(path)!r} cannot be read ({error}); give a file of UTF-8 text") from None
    if not len(ids):
        raise ConvertError(f"text={str(path)!r} is empty; give a file of UTF-8 text")
    return ids


def num_ids_of(trained: Trained) -> int:
    """The ids that the run's data has."""
    config, tokenizer = trained.program.config, trained.tokenizer
    found = config.data.vocabulary(None if tokenizer is None else tokenizer.vocab_size)
    return found or config.model.vocab_size or 1


def pieces(rng: np.random.Generator, shape: tuple[int, int], num_ids: int, text: np.ndarray | None) -> np.ndarray:
    """Random ids, or pieces of a text, which is repeated where it is shorter than one."""
    if text is None:
        return rng.integers(0, num_ids, shape, np.int32)
    rows, length = shape
    whole = np.resize(text, max(len(text), length)).astype(np.int32)
    starts = rng.integers(0, len(whole) - length + 1, rows)
    return whole[starts[:, None] + np.arange(length)]


def rows_of(config: ExperimentConfig, mesh: Mesh, least: int) -> tuple[int, int]:
    """The micro-batches of a pass (of a pipeline), and the rows, `least` or more, that divide over them and the mesh."""
    accumulate = config.optimizer.accumulate if mesh.shape["pipeline"] > 1 else 1
    each = ways(mesh, BATCH) * accumulate
    return accumulate, each * -(-least // each)

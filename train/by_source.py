"""A mixture's sources in metrics: the loss and tokens of each, in training and on what is held out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from plait.data.loader import Data
from plait.train.scoring.evaluate import Evaluation, Evaluator
from plait.train.state import Arrays, Blueprint
from plait.train.watching.watchers import Memory


def sums_by_source(rows: Array, sources: Array, count: int) -> Array:
    """Sums over the rows of each source, float32 `[count, 2]`.

    Args:
        rows: negative log-likelihood and number of predicted tokens of each row, float32 `[B, 2]`.
        sources: int32 `[B]`.
    """
    own = sources[None, :, None] == jnp.arange(count)[:, None, None]
    return jnp.where(own, rows[None], 0).sum(1)


class Meter(Memory):
    """What the steps since the last line of metrics were of each source, and all since the start."""

    name = "sources"
    fields = ("tokens", "nats", "recent")

    def __init__(self, names: Sequence[str]):
        self._names = list(names)
        self.tokens = [0] * len(self._names)
        """Predicted so far, of each source."""
        self.nats = [0.0] * len(self._names)
        """Since the last line."""
        self.recent = [0] * len(self._names)
        """Tokens since the last line."""

    def count(self, sums: np.ndarray) -> None:
        """One more step, of which these are the sums, `[S, 2]`."""
        for index, (nats, tokens) in enumerate(sums.tolist()):
            self.nats[index] += nats
            self.recent[index] += int(tokens)
            self.tokens[index] += int(tokens)

    def lap(self) -> dict[str, float]:
        """The metrics of the steps since they were last asked for; no loss of a source that had no tokens."""
        found = {f"tokens/source/{name}": float(tokens) for name, tokens in zip(self._names, self.tokens, strict=True)}
        for name, nats, tokens in zip(self._names, self.nats, self.recent, strict=True):
            if tokens:
                found[f"loss/source/{name}"] = nats / tokens
        self.nats, self.recent = [0.0] * len(self._names), [0] * len(self._names)
        return found


class Validation:
    """Scores what is held out, of a mixture each source alone; compiled once a source."""

    def __init__(self, blueprint: Blueprint, mesh: Mesh, data: Data):
        parts = data.parts or {"": data}
        self._parts = {name: part for name, part in parts.items() if len(part.val)} or parts  # of nothing the evaluator says so
        self._evaluators = {name: Evaluator(blueprint, mesh, part) for name, part in self._parts.items()}
        self._mixed, self._task = bool(data.parts), data.config.task.name

    def __call__(self, params: Arrays, buffers: Arrays, limit: int | None = None) -> Evaluation:
        """Scores the first `limit` batches (all by default), of a mixture so many of all sources in proportion, one at least of each."""
        total = sum(len(part.val) for part in self._parts.values()) or 1
        found: dict[str, Evaluation] = {}
        for name, part in self._parts.items():
            most = None if limit is None else max(1, round(limit * len(part.val) / total))
            found[name] = self._evaluators[name](params, buffers, part.val, most)
        return merged(found, self._task) if self._mixed else found[""]


def merged(parts: Mapping[str, Evaluation], task: str) -> Evaluation:
    """All held-out tokens of some sources together; bits per byte are of those that are text."""
    every = list(parts.values())
    texts = [one for one in every if one.num_bytes is not None]
    total = lambda name: sum(getattr(one, name) for one in every)
    return Evaluation(
        task=task,
        nats=total("nats"),
        num_tokens=total("num_tokens"),
        num_bytes=sum(one.num_bytes or 0 for one in texts) if texts else None,
        nats_by_position=total("nats_by_position"),
        tokens_by_position=total("tokens_by_position"),
        text_nats=sum(one.nats for one in texts) if texts else None,
        sources=parts,
    )


def told_by_source(metrics: dict[str, Any]) -> np.ndarray | None:
    """The sums by source that a step's metrics hold, taken out of them; None without a mixture."""
    sums = metrics.pop("sources", None)
    return None if sums is None else np.asarray(sums, np.float64)

"""In-context linear regression: examples of a function, and what it gives for the next input.

    tokens    x1 .. xd  y  x1 .. xd  y  x1 .. xd        each number is the id of its bin
    targets    .     y  .   .     y  .   .     y        y where the last of its x stands; nothing elsewhere

Each row has a linear function of its own, w of the standard normal distribution, and inputs of it too. A model reads ids, so numbers are
rounded to the middles of bins: the inputs before the function is applied, so that they are known exactly, and what it gives behind it.
Results are divided by the square root of d, as published errors are by d: predicting 0 has an error of about 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np

from plait.configs.domains import Number, Whole
from plait.data.config import DataConfig
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED, GeneratedTask
from plait.data.tasks.linear_fits import least_squares, ridge, share_between

if TYPE_CHECKING:
    from plait.data.batch import Batch

LIMIT = 4.0
"""The bins reach from -LIMIT to LIMIT, and the outer ones hold what is beyond."""


@TASKS.register("regression", source="What Can Transformers Learn In-Context? (2208.01066), linear functions, as ids of bins")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionTask(GeneratedTask):
    """Linear functions from examples: squared errors by their number, beside those of ridge regression and of least squares."""

    num_dims: Annotated[int, Whole(1, 256)] = 5
    """Channels d of an input; published: 20, in rows of 2 d + 1 examples of d + 1 tokens."""
    num_bins: Annotated[int, Whole(2, 2**16)] = 64
    """Bins of a number; ids are those of inputs, then those of results."""
    noise_std: Annotated[float, Number(least=0, most=100)] = 0.0
    """Standard deviation of what is added to a result before it is divided; published: 0, and 1 in d = 20."""

    def vocabulary(self, data: DataConfig) -> int:
        return 2 * self.num_bins

    def fit(self, data: DataConfig) -> None:
        least = 2 * self.num_dims + 1
        if least > data.seq_len:
            most = (data.seq_len - 1) // 2
            less = f"{most} or less, or " if most else ""
            raise ValueError(
                f"num_dims={self.num_dims} needs rows of at least {least} tokens, for an example and an input, not "
                f"data.seq_len={data.seq_len}; use {less}data.seq_len={least} or more"
            )

    def generate(self, draws: Draws, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        dims, rows = self.num_dims, draws.num_rows
        count = -(-(seq_len + 1) // (dims + 1))  # the last may be cut off
        weights = draws.normal(dims)
        inputs = self._bin(draws.normal(count * dims)).reshape(rows, count, dims)
        results = (self._middle(inputs) @ weights[:, :, None])[..., 0] + self.noise_std * draws.normal(count)
        told = self.num_bins + self._bin(results / np.sqrt(dims))
        stream = np.concatenate([inputs, told[..., None]], axis=-1).reshape(rows, -1)[:, : seq_len + 1]
        asked = np.arange(1, seq_len + 1) % (dims + 1) == dims
        return stream[:, :-1], np.where(asked, stream[:, 1:], NOT_ASKED)

    def distances(self, batch: Batch, likeliest: np.ndarray) -> Mapping[str, tuple[float, float]]:
        dims, bins = self.num_dims, self.num_bins
        rows = batch.loss_mask.any(1)
        at = np.arange(dims - 1, batch.tokens.shape[1], dims + 1)  # where results are asked for
        if not rows.any():
            return {}
        tokens, ids, told = batch.tokens[rows], batch.targets[rows][:, at] - bins, likeliest[rows][:, at] - bins
        x = self._middle(tokens[:, at[:, None] + np.arange(1 - dims, 1)])
        y = self._middle(ids)
        known = (told >= 0) & (told < bins)
        width = 2 * LIMIT / bins
        added = self.noise_std**2 / dims
        outer = (ids == 0) | (ids == bins - 1)  # how far out is not known
        bayes = ridge(x, y, prior=1 / dims, noise=np.where(outer, np.inf, added + width**2 / 12))
        edges = np.concatenate([[-np.inf], -LIMIT + width * np.arange(1, bins), [np.inf]])
        share = share_between(edges[ids], edges[ids + 1], bayes.mean, np.sqrt(bayes.variance + added))
        error = np.square(np.where(known, self._middle(np.where(known, told, 0)), 0.0) - y)
        ridge_error = np.square(bayes.mean - y)
        total = lambda values: (float(values.sum()), float(values.size))
        found = {
            "error": total(error),
            "ridge_error": total(ridge_error),
            "ridge_loss": total(-np.log(np.maximum(share, 1e-30))),
        }
        for k in self._numbers(len(at)):
            found[f"error_after_{k}"] = total(error[:, k])
            found[f"ridge_error_after_{k}"] = total(ridge_error[:, k])
            found[f"least_squares_error_after_{k}"] = total(np.square(least_squares(x, y, k) - y[:, k]))
        return found

    def _numbers(self, count: int) -> list[int]:
        """Numbers of examples to tell errors of: all up to 2 d, as published, and doubling from there on."""
        numbers = [*range(2 * self.num_dims + 1)]
        while numbers[-1] < count:
            numbers.append(2 * numbers[-1])
        return [k for k in numbers if k < count]

    def _bin(self, numbers: np.ndarray) -> np.ndarray:
        return np.clip(np.floor((numbers + LIMIT) * self.num_bins / (2 * LIMIT)), 0, self.num_bins - 1).astype(np.int64)

    def _middle(self, ids: np.ndarray) -> np.ndarray:
        return (ids + 0.5) * (2 * LIMIT / self.num_bins) - LIMIT

"""What can be known of a linear function from examples of it: ridge regression, which is Bayes' answer, and least squares.

Examples are rows of their own functions, R side by side: inputs x [R, N, D] and what they were seen to give, y [R, N]. Prediction k of a
row is of its input k, from the k examples before it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Prediction(NamedTuple):
    """A normal distribution of what each input gives, before anything is added to it, [R, N]."""

    mean: np.ndarray
    variance: np.ndarray


def ridge(x: np.ndarray, y: np.ndarray, *, prior: float, noise: np.ndarray) -> Prediction:
    """Weights of the normal distribution of variance `prior` a channel, seen through noise of variance `noise`, [R, N], both above 0.

    With the same noise throughout the mean is that of ridge regression with a penalty of `noise / prior`; of all predictions it has the
    least expected squared error. Noise of infinite variance says that an example is not to be learned from.
    Source: Bishop, Pattern Recognition and Machine Learning, section 3.3.
    """
    rows, count, dims = x.shape
    covariance = np.tile(prior * np.eye(dims), (rows, 1, 1))
    weights, mean, variance = np.zeros((rows, dims)), np.empty((rows, count)), np.empty((rows, count))
    for k in range(count):
        along = np.einsum("rij,rj->ri", covariance, x[:, k])
        mean[:, k], variance[:, k] = (weights * x[:, k]).sum(1), (along * x[:, k]).sum(1)
        gain = along / (variance[:, k] + noise[:, k])[:, None]
        weights += gain * (y[:, k] - mean[:, k])[:, None]
        covariance -= gain[:, :, None] * along[:, None, :]
    return Prediction(mean, np.maximum(variance, 0.0))


def least_squares(x: np.ndarray, y: np.ndarray, after: int) -> np.ndarray:
    """Prediction `after` alone, [R], by the smallest weights among those that fit the examples best; 0 without any."""
    if not after:
        return np.zeros(len(x))
    weights = np.linalg.pinv(x[:, :after]) @ y[:, :after, None]
    return (x[:, after] * weights[:, :, 0]).sum(1)


def share_between(low: np.ndarray, high: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Share of a normal distribution between two bounds, which may be infinite; a deviation may be 0."""
    erfc = np.vectorize(math.erfc, otypes=[float])
    first, last = ((bound - mean) / np.maximum(deviation, 1e-12) / math.sqrt(2) for bound in (low, high))
    side = np.where(first > 0, 1.0, -1.0)  # a small share is no difference of two numbers near 2
    return np.abs(erfc(side * first) - erfc(side * last)) / 2

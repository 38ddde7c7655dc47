"""Random numbers that belong to rows."""

from __future__ import annotations

import numpy as np

from plait.data.splitmix import GAMMA, mix, salted


class Draws:
    """Random numbers for some rows, R of them at a time: a row's depend on its number and the salt alone.

    So they are the same on any host, beside any other rows and with any version of NumPy. Each call goes on in the stream of every row.

    Args:
        index: numbers of the rows, from 0 on, [R].
        salt: sets tasks, seeds and streams apart.
    """

    def __init__(self, index: np.ndarray, *salt: object) -> None:
        self._state = salted(mix(np.asarray(index).astype(np.uint64)), *salt)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self._state)

    def uniform(self, count: int) -> np.ndarray:
        """Numbers at least 0 and below 1, float64 [R, count]."""
        bits = mix(self._state[:, None] + GAMMA * np.arange(count, dtype=np.uint64))
        self._state = self._state + GAMMA * np.asarray([count], np.uint64)
        return (bits >> np.uint64(11)) * 2.0**-53

    def integers(self, stop: int, count: int) -> np.ndarray:
        """Numbers below `stop`, int64 [R, count]."""
        return (self.uniform(count) * stop).astype(np.int64)

    def normal(self, count: int) -> np.ndarray:
        """Numbers of the standard normal distribution, float64 [R, count]."""
        radius, turn = np.split(self.uniform(2 * count), 2, axis=1)
        return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * turn)

    def distinct(self, stop: int, count: int) -> np.ndarray:
        """Different numbers below `stop`, each set and each order of it as likely as any other, int64 [R, count]."""
        at_most = np.arange(stop - count, stop)  # Floyd's algorithm: what is taken already gives way to the largest
        drawn = (self.uniform(count) * (at_most + 1)).astype(np.int64)
        for k, largest in enumerate(at_most):
            taken = (drawn[:, :k] == drawn[:, k : k + 1]).any(axis=1)
            drawn[taken, k] = largest
        return np.take_along_axis(drawn, np.argsort(self.uniform(count), axis=1), axis=1)

    def distinct_by_weight(self, weights: np.ndarray, count: int) -> np.ndarray:
        """Indices of `weights`, [R, count], drawn one after another in proportion to the weights of those not drawn yet."""
        arrivals = -np.log1p(-self.uniform(len(weights))) / weights  # the first of exponential clocks rings in that proportion
        return np.argsort(arrivals, axis=1)[:, :count]

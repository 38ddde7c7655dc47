"""Spikes of the loss or of the gradient: what counts as one, from the steps before it alone, so that a resumed run decides alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from plait.configs.spike import SpikeConfig

_MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
_LEAST_RISE = 0.1  # share of the median that a spike rises at least: a flat history makes no spike of a ripple
_LAG = 2  # the metrics of a step are read after the next one is dispatched


class Rewind(Exception):
    """Step `step` spiked and the run shall go back."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class SpikeWatch:
    """The bounds that loss and gradient norm of a step may not exceed: robust standard deviations above the median of recent steps."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.rewinds = 0
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=config.window + _LAG)

    def bounds(self, step: int) -> np.ndarray:
        """Largest loss and gradient norm, float32 [2], of step `step`, infinite while too little is known."""
        config = self.config
        history = np.array([numbers for at, *numbers in self._recent if at <= step - _LAG][-config.window :])
        if config.sigma is None or 4 * len(history) < config.window:
            return np.full(2, np.inf, np.float32)
        median = np.median(history, axis=0)
        spread = _MAD_TO_SIGMA * np.median(np.abs(history - median), axis=0)
        return (median + np.maximum(config.sigma * spread, _LEAST_RISE * np.abs(median))).astype(np.float32)

    def note(self, step: int, loss: float, norm: float) -> str | None:
        """Takes in a step; says so where it was a spike. One that is not finite is none: its rule is `optimizer.max_bad_steps`."""
        if not np.isfinite([loss, norm]).all():
            return None
        bounds = self.bounds(step)
        self._recent.append((step, loss, norm))
        for name, value, bound in zip(("loss", "gradient norm"), (loss, norm), bounds, strict=True):
            if value > bound:
                return f"the {name} of step {step:,} was {value:.4g}, above {bound:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything later bounds depend on, as JSON."""
        return {"recent": [list(entry) for entry in self._recent], "rewinds": self.rewinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self.rewinds = state["rewinds"]
        self._recent = deque(map(tuple, state["recent"]), maxlen=self._recent.maxlen)

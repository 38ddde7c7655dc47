"""Spikes of the loss or of the gradient: what counts as one, from the steps before it alone, so that a resumed run decides alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from plait.configs.spike import SpikeConfig
from plait.train.watching.watchers import Event, Values, Watcher

_MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
_LEAST_RISE = 0.1  # share of the median that a spike rises at least: a flat history makes no spike of a ripple
LAG = 2
"""Steps until what a step showed can matter: its metrics are read after the next one is dispatched."""


def spike_bounds(history: np.ndarray, *, sigma: float, window: int) -> tuple[Any, Any]:
    """`(median, bound)` over the first axis of `history`: a spike lies `sigma` robust standard deviations above the median, and a tenth of
    it. NaN and infinity while it has less than a quarter of `window` entries."""
    if 4 * len(history) < window:
        return np.full(history.shape[1:], np.nan), np.full(history.shape[1:], np.inf)
    median = np.median(history, axis=0)
    spread = _MAD_TO_SIGMA * np.median(np.abs(history - median), axis=0)
    return median, median + np.maximum(sigma * spread, _LEAST_RISE * np.abs(median))


class LossSpikes(Watcher):
    """Reports when the training loss leaves its usual range, or the finite numbers; once until it is back."""

    name = "loss_spike"
    fields = ("recent", "spiking", "last")

    def __init__(self, sigma: float = 6.0, window: int = 32):
        """Args: as in `SpikeConfig`, whose rule this is, over the steps before without a lag."""
        self.window = window
        self.limits = {self.name: (sigma,)}
        self.kinds = {
            self.name: f"the loss is not finite, or above the median of the last {window} by as many robust standard deviations as the limit "
            f"and by {_LEAST_RISE:.0%} of it; once until it is back"
        }
        self.recent: list[float] = []
        self.spiking = False
        self.last: int | None = None
        """Step of the last loss that was one."""

    def update(self, step: int, values: Values) -> list[Event]:
        if "loss/train" not in values:
            return []
        loss = float(values["loss/train"])
        (sigma,) = self.limits[self.name]
        median, bound = map(float, spike_bounds(np.asarray(self.recent), sigma=sigma, window=self.window))
        count = len(self.recent)
        spiking = not loss <= bound if math.isfinite(loss) else True
        starts, self.spiking = spiking and not self.spiking, spiking
        if math.isfinite(loss):
            self.recent = [*self.recent, loss][-self.window :]
        if spiking:
            self.last = step
        if not starts:
            return []
        usual = f"; the last {count} losses have the median {median:.3f}" if math.isfinite(median) else ""
        text = f"loss {loss:.3f}{usual}" if math.isfinite(loss) else f"the loss is not finite{usual}"
        return [Event(step, self.name, None, None, loss, bound, text)]


class SpikeWatch(Watcher):
    """The bounds that loss and gradient norm of a step may not exceed."""

    name = "spikes"
    fields = ("recent",)
    skipped = "spike_skipped"
    """The kind of its events,"""
    rewound = "rewind"
    """and of those of a run that has gone back, the next step of which is not dispatched yet."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.kinds = {
            self.skipped: "with `--spike.sigma`: the update of a step was left out; each time",
            self.rewound: "with `--spike.action rewind` or `--event.KIND.action rewind`: the run went back to a checkpoint; each time",
        }
        self.recent: list[list[float]] = []
        """Step, loss and gradient norm of the last finite steps."""

    def bounds(self, step: int) -> np.ndarray:
        """Largest loss and gradient norm, float32 [2], of step `step`, infinite while too little is known."""
        config = self.config
        if config.sigma is None:
            return np.full(2, np.inf, np.float32)
        history = np.array([numbers for at, *numbers in self.recent if at <= step - LAG][-config.window :]).reshape(-1, 2)
        return spike_bounds(history, sigma=config.sigma, window=config.window)[1].astype(np.float32)

    def update(self, step: int, values: Values) -> list[Event]:
        loss = values["loss/train"]
        spike = self.note(step, loss, values["grad/norm"])
        if spike is None:
            return []
        return [Event(step, self.skipped, None, None, loss, float(self.bounds(step)[0]), f"{spike}: its update was left out")]

    def note(self, step: int, loss: float, norm: float) -> str | None:
        """Takes in a step; says so where it was a spike. One that is not finite is none: its rule is `optimizer.max_bad_steps`."""
        if not np.isfinite([loss, norm]).all():
            return None
        bounds = self.bounds(step)
        self.recent = [*self.recent, [step, loss, norm]][-(self.config.window + LAG) :]
        for name, value, bound in zip(("loss", "gradient norm"), (loss, norm), bounds, strict=True):
            if value > bound:
                return f"the {name} of step {step:,} was {value:.4g}, above {bound:.4g}"
        return None

"""The learning rate over the steps of a run."""

from __future__ import annotations

import optax

from plait.configs.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Rate by step: linear warm-up to `peak`, then as `config.schedule` says (WSD: arXiv 2404.06395).

    The last step of the warm-up has the peak, and the last step of all has exactly `final_ratio` of it.
    """
    warmup, last = config.warmup_steps, peak * config.final_ratio
    (top, end), flat = _from_to(config, steps), plateau(config, steps)
    if flat is None:
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, end - top, alpha=config.final_ratio)
    else:
        decay = optax.linear_schedule(peak, last, end - flat)
        after = optax.join_schedules([optax.constant_schedule(peak), decay], [flat - top])
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, top), after], [top])


def plateau(config: OptimizerConfig, steps: int) -> int | None:
    """The last step, counted from 0, before the rate of a run of so many steps falls; None where it never does."""
    top, end = _from_to(config, steps)
    if config.schedule == "constant":
        return None
    if config.schedule == "cosine":
        return top
    return end - min(max(round(config.decay_fraction * steps), 1), end - top)


def _from_to(config: OptimizerConfig, steps: int) -> tuple[int, int]:
    """The first step at the peak and the one that has the last rate."""
    top = max(config.warmup_steps - 1, 0)
    return top, max(steps - 1, top + 1)

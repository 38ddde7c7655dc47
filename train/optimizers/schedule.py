"""The learning rate over the steps of a run."""

from __future__ import annotations

import optax

from plait.configs.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Rate by step: linear warm-up to `peak`, then as `config.schedule` says (WSD: arXiv 2404.06395).

    The last step of the warm-up has the peak, and the last step of all has exactly `final_ratio` of it.
    """
    warmup, last = config.warmup_steps, peak * config.final_ratio
    top = max(warmup - 1, 0)
    rest = max(steps - 1 - top, 1)  # steps below the peak
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio)
    else:
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        after = optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [rest - decay])
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, top), after], [top])

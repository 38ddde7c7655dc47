"""The learning rate over the steps of a run."""

from __future__ import annotations

import optax

from plait.configs.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Rate by step: linear warm-up to `peak`, then as `config.schedule` says (WSD: arXiv 2404.06395)."""
    warmup = config.warmup_steps
    last = peak * config.final_ratio
    warm = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio)
    else:
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        after = optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [rest - decay])
    return optax.join_schedules([warm, after], [warmup]) if warmup else after

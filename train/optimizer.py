"""The optimizer and its schedule."""

from __future__ import annotations

import optax

from plait.configs.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then as `config.schedule` says (WSD: arXiv 2404.06395)."""
    peak, warmup = config.learning_rate, config.warmup_steps
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


def make_optimizer(config: OptimizerConfig, steps: int, decay: dict[str, bool]) -> optax.GradientTransformation:
    """Clipping and AdamW (arXiv 1711.05101); weight decay where `decay` says so."""
    adamw = optax.adamw(
        make_schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

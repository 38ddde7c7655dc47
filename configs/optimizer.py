"""What every optimizer is told: its rate over the steps, and how a step is made."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.components import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW with decoupled weight decay on matrices, and its schedule."""

    path = "optimizer"

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a cosine to the final rate, a plateau with a linear decay at the end (WSD), or the peak throughout."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Share of the steps that WSD spends decaying."""
    final_ratio: float = 0.1
    """Last learning rate over the peak (cosine and WSD)."""
    weight_decay: float = 0.1
    """Decay of projections and embeddings per unit of learning rate; gains, biases and decays have none."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""
    accumulate: int = 1
    """Micro-batches whose gradients make one step; must divide the batch. With `mesh.pipeline` they flow through its stages."""
    ema: float | None = None
    """Decay of a running average of the parameters, used by evaluation and generation; None keeps none."""
    max_bad_steps: int = 20
    """Consecutive non-finite steps (skipped, counted) after which the run stops."""

    def check(self) -> None:
        checks = [
            (self.learning_rate > 0, "learning_rate", "must be positive"),
            (self.warmup_steps >= 0, "warmup_steps", "must be 0 or more"),
            (0 < self.decay_fraction <= 1, "decay_fraction", "must be above 0 and at most 1"),
            (0 <= self.final_ratio <= 1, "final_ratio", "must be between 0 and 1"),
            (self.weight_decay >= 0, "weight_decay", "must be 0 or more"),
            (0 <= self.b1 < 1, "b1", "must be at least 0 and below 1"),
            (0 <= self.b2 < 1, "b2", "must be at least 0 and below 1"),
            (self.eps > 0, "eps", "must be positive"),
            (self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive; use None for no clipping"),
            (self.accumulate >= 1, "accumulate", "must be at least 1"),
            (self.ema is None or 0 < self.ema < 1, "ema", "must be above 0 and below 1; use None for no average"),
            (self.max_bad_steps >= 1, "max_bad_steps", "must be at least 1"),
        ]
        for good, name, rule in checks:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} {rule}")

"""Adam with decoupled weight decay."""

from __future__ import annotations

import dataclasses

import optax

from plait.configs.domains import Decay, Positive
from plait.configs.optimizer import OPTIMIZERS, OptimizerConfig, Parameters, Rate


@OPTIMIZERS.register("adamw", source="Decoupled weight decay (arXiv 1711.05101)", path="optimizer")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay.

    `m = b1 m + (1 - b1) g`, `n = b2 n + (1 - b2) g^2`, `w -= rate (m' / (sqrt(n') + eps) + weight_decay w)`, where `m'` and `n'` are
    the moments over `1 - b1^t` and `1 - b2^t` at step t.
    """

    b1: Decay = 0.9
    """Decay of the first moment."""
    b2: Decay = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""

    def check(self) -> None:
        self.require_kept("b1")

    def build(self, rate: Rate, parameters: Parameters) -> optax.GradientTransformation:
        return optax.adamw(
            rate(self.learning_rate),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask={name: parameter.decays for name, parameter in parameters.items()},
        )

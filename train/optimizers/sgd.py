"""Gradient descent: what studies compare with."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import optax

from plait.configs.domains import LearningRate, Number
from plait.configs.optimizer import OPTIMIZERS, OptimizerConfig, Parameters, Rate


@OPTIMIZERS.register(
    "sgd",
    source="On the importance of initialization and momentum in deep learning (ICML 2013); decoupled decay: SGDW (arXiv 1711.05101)",
    path="optimizer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum.

    `m = momentum m + g`, `w -= rate (m + weight_decay w)`; with Nesterov's momentum `g + momentum m` in place of `m`.
    """

    learning_rate: LearningRate = 3e-2
    """Peak learning rate."""
    momentum: Annotated[float, Number(above=0, below=1)] | None = 0.9
    """Share of the last step's momentum that stays; None keeps none, and no state."""
    nesterov: bool = False
    """Steps from where the momentum leads."""

    def check(self) -> None:
        if self.nesterov and self.momentum is None:
            raise ValueError("nesterov=True needs momentum; set one, as 0.9")
        self.require_kept("momentum")

    def build(self, rate: Rate, parameters: Parameters) -> optax.GradientTransformation:
        decays = {name: parameter.decays for name, parameter in parameters.items()}
        return optax.chain(
            optax.identity() if self.momentum is None else optax.trace(self.momentum, self.nesterov),
            optax.add_decayed_weights(self.weight_decay, decays),
            optax.scale_by_learning_rate(rate(self.learning_rate)),
        )

"""Muon, and which parameters it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import optax

from plait.configs.domains import Decay, LearningRate, Positive, Whole
from plait.configs.optimizer import OPTIMIZERS, OptimizerConfig, Parameter, Parameters, Rate
from plait.models import axes
from plait.train.optimizers.matrices import map_matrices

_STACKED = (axes.LAYERS, axes.EXPERTS)
"""Axes along which matrices are stacked."""


@OPTIMIZERS.register(
    "muon",
    source="Muon (kellerjordan.github.io/posts/muon); Muon is Scalable for LLM Training (arXiv 2502.16982)",
    path="optimizer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Momentum orthogonalised by Newton-Schulz for parameters of role `matrix`, AdamW for all others.

    `m = momentum m + g`, `w -= rate (scale NS(m) + weight_decay w)`; with Nesterov's momentum `g + momentum m` in place of `m`. `NS`
    takes a matrix near the orthogonal one closest to it, by `ns_steps` of `X <- a X + (b A + c A A) X` with `A = X X^T`, from
    `X = m / |m|`; (a, b, c) = (3.4445, -4.7750, 2.0315).
    """

    adam_learning_rate: LearningRate | None = None
    """Peak rate of the parameters that AdamW moves; None for `learning_rate`."""
    momentum: Decay = 0.95
    """Share of the last step's momentum that stays."""
    nesterov: bool = True
    """Steps from where the momentum leads."""
    ns_steps: Annotated[int, Whole(1, 100)] = 5
    """Newton-Schulz iterations."""
    adjust: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Scale of an orthogonal `[n, m]`: `sqrt(max(1, m / n))`, or `0.2 sqrt(max(n, m))`, as large as AdamW's update at the same rate."""
    per_head: bool = False
    """Orthogonalises each head, or other part of a fused projection, by itself, in place of the whole matrix."""
    adam_b1: Decay = 0.9
    """Decay of AdamW's first moment."""
    adam_b2: Decay = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""

    def check(self) -> None:
        self.require_kept("momentum")
        self.require_kept("adam_b1")

    def build(self, rate: Rate, parameters: Parameters) -> optax.GradientTransformation:
        for parameter in parameters.values():
            _check_matrix(parameter)
        matrices = optax.chain(
            optax.trace(self.momentum, self.nesterov),
            optax.stateless(lambda updates, _: self._orthogonalised(updates, parameters)),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate(self.learning_rate)),
        )
        others = optax.adamw(
            rate(self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate),
            b1=self.adam_b1,
            b2=self.adam_b2,
            eps=self.adam_eps,
            weight_decay=self.weight_decay,
            mask={name: parameter.decays for name, parameter in parameters.items()},
        )
        groups = {name: "matrices" if parameter.role == "matrix" else "others" for name, parameter in parameters.items()}
        return optax.partition({"matrices": matrices, "others": others}, groups)

    def _orthogonalised(self, updates: Mapping[str, Any], parameters: Parameters) -> dict[str, Any]:
        matrices = {name: update for name, update in updates.items() if not isinstance(update, optax.MaskedNode)}
        return {**updates, **map_matrices(self._orthogonal, matrices, parameters, blocks=self.per_head)}

    def _orthogonal(self, x: jax.Array) -> jax.Array:
        """Matrices `[N, n, m]`, orthogonalised and scaled. Source: Muon; the scale of `match_rms_adamw` 2502.16982, equation 4."""
        iterations = optax.contrib.scale_by_muon(
            ns_steps=self.ns_steps,
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2),
        )
        n, m = x.shape[1:]
        scale = max(1, m / n) ** 0.5 if self.adjust == "original" else 0.2 * max(n, m) ** 0.5
        return scale * iterations.update(x, iterations.init(x))[0]


def _check_matrix(parameter: Parameter) -> None:
    """Raises ValueError where a parameter of role `matrix` is none, or its parts do not make it up."""
    if parameter.role != "matrix":
        return
    if len(parameter.shape) < 2 or any(axis in _STACKED for axis in parameter.axes[-2:]):
        own = tuple(size for size, axis in zip(parameter.shape, parameter.axes, strict=True) if axis not in _STACKED)
        raise ValueError(
            f"parameter {parameter.name} has role='matrix' and shape {own}; optimizer muon needs two axes or more beside stacked layers "
            "and experts; make it with role='vector', or another role that AdamW moves"
        )
    if parameter.split is not None:
        axis, sizes = parameter.split
        if axis not in (-1, -2) or sum(sizes) != parameter.shape[axis] or min(sizes) < 1:
            raise ValueError(
                f"parameter {parameter.name} has split={parameter.split} and shape {parameter.shape}; the axis must be -1 or -2 and the "
                "sizes positive and add up to it; correct the split where the parameter is made"
            )

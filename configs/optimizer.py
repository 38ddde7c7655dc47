"""The optimizer contract: what every optimizer is told of the run and of each parameter, and the registry of them all.

An optimizer is a frozen config in one file of `train/optimizers/`, found by its registered name: nothing else is edited to add one.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import optax
from jax.sharding import NamedSharding

from plait.configs.components import Component, Registry
from plait.configs.domains import Average, Counted, LearningRate, Number, Positive, Rows, Share, SomeCoefficient, Steps
from plait.models.axes import Axes
from plait.models.build import PRODUCTS, Role

Rate = Callable[[float], optax.Schedule]
"""The learning rate by step of a peak rate, over a run's steps."""

_LARGEST_DECAY = {"float32": 1.0, "bfloat16": 0.95}
"""Of moments kept in a dtype: a step adds a share `1 - decay`, which must be well above one rounding of the moment."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What an optimizer knows of a parameter."""

    name: str
    """Dotted path in the model."""
    shape: tuple[int, ...]
    axes: Axes
    """Logical name of each axis."""
    role: Role
    split: tuple[int, tuple[int, ...]] | None = None
    """Axis, counted from the end, and sizes of the independent matrices that a fused projection holds."""
    layout: NamedSharding | None = None
    """How its gradient and moments lie; None where no mesh is known."""

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it."""
        return self.role in PRODUCTS


Parameters = Mapping[str, Parameter]
"""The trained parameters by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Component, abc.ABC):
    """What all optimizers share: the rate over the steps, and how a step is made."""

    learning_rate: LearningRate = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: a cosine to the final rate, a plateau with a linear decay at the end (WSD), or the peak throughout."""
    warmup_steps: Counted = 100
    """Steps of linear warm-up."""
    decay_fraction: Annotated[float, Number(above=0, most=1)] = 0.2
    """Share of the steps that WSD spends decaying."""
    final_ratio: Share = 0.1
    """Last learning rate over the peak (cosine and WSD)."""
    weight_decay: SomeCoefficient = 0.1
    """Decay of projections and embeddings per unit of learning rate; gains, biases and decays have none."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None for no clipping."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """What first moments (momentum) are kept in between steps. Second moments, sums and updates are float32 whatever the parameters are."""
    accumulate: Rows = 1
    """Micro-batches whose gradients make one step; must divide the batch. With `mesh.pipeline` they flow through its stages."""
    ema: Average | None = None
    """Decay of a running average of the parameters, used by evaluation and generation; None keeps none."""
    max_bad_steps: Steps = 20
    """Consecutive non-finite steps (skipped, counted) after which the run stops."""

    @abc.abstractmethod
    def build(self, rate: Rate, parameters: Parameters) -> optax.GradientTransformation:
        """The transformation of gradients, already clipped, to updates.

        Its state holds moments in the layout of the parameters, in trees that `optax.tree_utils.tree_map_params` finds.

        Args:
            rate: gives the schedule of a peak rate, as `rate(self.learning_rate)`.

        Raises:
            ValueError: a parameter is not what its role asks for.
        """

    def require_kept(self, name: str) -> None:
        """Raises ValueError where moments of decay `name` are kept in a dtype that rounds away what a step adds to them."""
        decay = getattr(self, name)
        if decay is not None and decay > _LARGEST_DECAY[self.moment_dtype]:
            raise ValueError(
                f"moment_dtype={self.moment_dtype} rounds away what {name}={decay} lets a step add; use float32, or {name} of "
                f"{_LARGEST_DECAY[self.moment_dtype]} or less"
            )


OPTIMIZERS: Registry[OptimizerConfig] = Registry("optimizer", "plait.train.optimizers", OptimizerConfig)


def optimizer(name: str, **options: Any) -> OptimizerConfig:
    """The config of an optimizer by name. Raises ValueError for an unknown one, naming the nearest, and for a bad value."""
    return OPTIMIZERS[name](**options)

"""The experiment: everything a run is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from plait.data.config import DataConfig
from plait.models.config import LMConfig
from plait.models.mixers.stats import ProbeConfig
from plait.models.pattern import find_period


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay on matrices, and its schedule."""

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

    def __post_init__(self) -> None:
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
                raise ValueError(f"optimizer.{name}={getattr(self, name)} {rule}")


MESH_AXES = ("pipeline", "data", "fsdp", "context", "tensor")
"""Mesh axes, the outermost first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has, from the outermost (across TPU slices) in; their product is the number of devices used."""

    pipeline: int = 1
    """Stages in which the repetitions of the layer pattern lie, one behind the other; `optimizer.accumulate` micro-batches fill them."""
    data: int | None = None
    """Data parallel; None takes the devices that the other axes leave."""
    fsdp: int = 1
    """Data parallel with parameters and optimizer state sharded."""
    context: int = 1
    """Tokens of a sequence sharded: each device holds a contiguous part of every row."""
    tensor: int = 1
    """Heads, channel-mixer widths and the vocabulary sharded."""
    zero: bool = False
    """ZeRO: moments and average sharded also over data, context and pipeline, gradients reduced to those parts."""
    offload: Literal["optimizer"] | None = None
    """What waits in the host's memory between updates: the optimizer's moments; None for nothing."""

    reserved: ClassVar[Mapping[str, str]] = {"expert": "is kept for layers of experts, which no model has yet; leave it out"}

    def __post_init__(self) -> None:
        for name in MESH_AXES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mesh.{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What counts as a spike of the loss or gradient norm, and what is done about it. The update of such a step is never applied."""

    sigma: float | None = None
    """Robust standard deviations above the median of recent steps from which a step is a spike; None never looks."""
    window: int = 128
    """Recent steps the median is over; a quarter of them must be there before the first spike."""
    action: Literal["skip", "rewind"] = "skip"
    """`skip` leaves the step out; `rewind` also goes back to the last checkpoint and leaves out the batches since."""
    max_rewinds: int = 5
    """Rewinds after which a further one ends the run."""

    def __post_init__(self) -> None:
        checks = [
            (self.sigma is None or self.sigma > 0, "sigma", "must be positive; use None to never look"),
            (self.window >= 4, "window", "must be at least 4"),
            (self.max_rewinds >= 1, "max_rewinds", "must be at least 1; use spike.action=skip for none"),
        ]
        for good, name, rule in checks:
            if not good:
                raise ValueError(f"spike.{name}={getattr(self, name)} {rule}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One pretraining run."""

    name: str
    """Preset it started from."""
    steps: int
    """Optimizer steps."""
    model: LMConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    probe: ProbeConfig = ProbeConfig()
    spike: SpikeConfig = SpikeConfig()
    seed: int = 0
    """Of the parameters; the data has its own, `data.seed`."""
    out: str | None = None
    """Run folder; None gives runs/NAME."""
    resume: bool = False
    """Go on with the run in the run folder."""
    log_every: int = 10
    """Steps between lines of metrics."""
    probe_every: int | None = 50
    """Steps between looks at the attention; None for none."""
    eval_every: int | None = 200
    """Steps between validations; None for one at the end only."""
    eval_batches: int | None = None
    """Batches of a validation; None for the whole held-out set."""
    checkpoint_every: int | None = 200
    """Steps between checkpoints; None for one at the end only."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints of lowest validation loss kept beside them."""
    wandb: str | None = None
    """Weights & Biases project that also gets the metrics (extra `wandb`)."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "probe_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1" + ("; use None to leave it out" if "every" in name else ""))
        if self.keep_best < 0:
            raise ValueError(f"keep_best={self.keep_best} must be 0 or more")
        if self.spike.action == "rewind" and self.spike.sigma is not None and self.checkpoint_every is None:
            raise ValueError("spike.action=rewind needs checkpoints to go back to; set checkpoint_every")
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate={self.optimizer.accumulate} must divide data.batch_size={self.data.batch_size}"
            )
        # A pattern from the command line comes before the depth that it must fit, so it is read only where there are stages.
        periods = find_period(self.model.layers)[1] if self.mesh.pipeline > 1 else 1
        if self.mesh.pipeline > 1 and (periods == 1 or periods % self.mesh.pipeline):
            fits = ", ".join(str(n) for n in range(1, periods + 1) if periods % n == 0)
            raise ValueError(
                f"mesh.pipeline={self.mesh.pipeline} must divide the {periods} repetitions of the pattern in "
                f"model.num_layers={self.model.num_layers}; use mesh.pipeline={fits} or another depth"
            )
        if self.optimizer.schedule != "constant" and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}; shorten the warm-up"
            )

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.out or f"runs/{self.name}"

"""The experiment: everything a run is made of."""

from __future__ import annotations

import dataclasses

from plait.configs.components import Config
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OptimizerConfig, optimizer
from plait.configs.probe import ProbeConfig
from plait.configs.spike import SpikeConfig
from plait.data.config import DataConfig
from plait.models.config import LMConfig
from plait.models.pattern import find_period


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Config):
    """One pretraining run."""

    name: str
    """Preset it started from."""
    steps: int
    """Optimizer steps."""
    model: LMConfig
    data: DataConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: optimizer("adamw"))
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

    def check(self) -> None:
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
        periods = find_period(self.model.layers)[1]
        if self.mesh.pipeline > 1 and (periods == 1 or periods % self.mesh.pipeline):
            fits = ", ".join(str(n) for n in range(1, periods + 1) if periods % n == 0)
            raise ValueError(
                f"mesh.pipeline={self.mesh.pipeline} must divide the {periods} repetitions of the pattern in "
                f"model.num_layers={self.model.num_layers}; use mesh.pipeline={fits} or another depth"
            )
        experts = self.model.channel_mixer.experts
        if experts is not None and experts % self.mesh.expert:
            fits = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise ValueError(
                f"mesh.expert={self.mesh.expert} must divide the {experts} experts of model.channel_mixer; use one of {fits}"
            )
        if self.optimizer.schedule != "constant" and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}; shorten the warm-up"
            )

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.out or f"runs/{self.name}"

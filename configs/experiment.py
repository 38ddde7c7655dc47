"""The experiment: everything a run is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from plait.configs.components import Config, Table
from plait.configs.domains import Counted, Line, Name, Seed, Steps, choices, divisors
from plait.configs.event import EventConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OptimizerConfig, optimizer
from plait.configs.probe import ProbeConfig
from plait.configs.spike import SpikeConfig
from plait.data.config import DataConfig
from plait.data.remote.address import written
from plait.models.config import LMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Config):
    """One pretraining run."""

    name: Name
    """Preset it started from."""
    steps: Steps
    """Optimizer steps."""
    model: LMConfig
    data: DataConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: optimizer("adamw"))
    mesh: MeshConfig = MeshConfig()
    probe: ProbeConfig = ProbeConfig()
    spike: SpikeConfig = SpikeConfig()
    event: Mapping[str, EventConfig] = dataclasses.field(default_factory=Table)
    """By kind, what is done about events."""
    seed: Seed = 0
    """Of the parameters; the data has its own, `data.seed`."""
    init_from: Line | None = None
    """Run, imported or trained, whose weights this one begins with, or one of its checkpoints as RUN/checkpoints/STEP; None draws new ones."""
    out: Line | None = None
    """Run folder, or its address as s3://BUCKET/RUN (extra `remote`); None gives runs/NAME."""
    resume: bool = False
    """Go on with the run in the run folder."""
    log_every: Steps = 10
    """Steps between lines of metrics."""
    probe_every: Steps | None = 50
    """Steps between looks at the attention; None for none."""
    eval_every: Steps | None = 200
    """Steps between validations; None for one at the end only."""
    eval_batches: Steps | None = None
    """Batches of a validation; None for the whole held-out set."""
    checkpoint_every: Steps | None = 200
    """Steps between checkpoints; None for one at the end only."""
    keep_last: Steps = 2
    """Newest checkpoints kept."""
    keep_best: Counted = 1
    """Checkpoints of lowest validation loss kept beside them."""
    wandb: Line | None = None
    """Weights & Biases project that also gets the metrics (extra `wandb`)."""

    def complete(self) -> None:
        object.__setattr__(self, "event", Table(self.event))

    def check(self) -> None:
        going_back = ["spike.action"] if self.spike.action == "rewind" and self.spike.sigma is not None else []
        going_back += [f"event.{kind}.action" for kind, event in self.event.items() if event.action == "rewind"]
        if going_back and (self.checkpoint_every is None or self.checkpoint_every >= self.steps):
            raise ValueError(
                f"{going_back[0]}=rewind needs checkpoints to go back to, not checkpoint_every={self.checkpoint_every} of steps={self.steps}; "
                "set checkpoint_every, to less than the steps"
            )
        if self.model.lora.rank is not None and self.init_from is None:
            raise ValueError(
                f"model.lora.rank={self.model.lora.rank} trains adapters of weights that are there, and init_from is None; name their run "
                "with --init-from RUN"
            )
        for name, longest in self.model.longest.items():
            if self.data.seq_len > longest:
                raise ValueError(
                    f"data.seq_len={self.data.seq_len} must be at most the {longest} tokens of model.{name}; "
                    "use shorter rows, or raise what limits it"
                )
        self.data.task.require_causal(self.model.causal)
        if self.data.batch_size % self.optimizer.accumulate:
            raise ValueError(
                f"optimizer.accumulate={self.optimizer.accumulate} must divide data.batch_size={self.data.batch_size}; "
                f"use one of {choices(divisors(self.data.batch_size))}"
            )
        periods = self.model.periods.repeats
        if self.mesh.pipeline > 1 and (periods == 1 or periods % self.mesh.pipeline):
            raise ValueError(
                f"mesh.pipeline={self.mesh.pipeline} must divide the {periods} repetitions of the pattern in "
                f"model.num_layers={self.model.num_layers}; use mesh.pipeline={choices(divisors(periods))} or another depth"
            )
        named = {f"channel_mixers.{name}": one for name, one in self.model.channel_mixers.items()}
        for name, one in {"channel_mixer": self.model.channel_mixer, **named}.items():
            experts = None if one is None else one.experts
            if experts is not None and experts % self.mesh.expert:
                raise ValueError(
                    f"mesh.expert={self.mesh.expert} must divide the {experts} experts of model.{name}; "
                    f"use one of {choices(divisors(experts))}"
                )
        if self.optimizer.schedule != "constant" and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}; shorten the warm-up"
            )

    @property
    def folder(self) -> str:
        """The run folder on this machine; what is written there is pushed to `out` where that is an address."""
        return f"runs/{self.name}" if self.out is None else str(written(self.out))

"""Which runs of a sweep end before their last step, by what others had reached at the same one."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from plait.configs.components import Config
from plait.configs.domains import Name, Steps, Whole
from plait.configs.experiment import ExperimentConfig

TRAINING = ("loss/train", "grad/norm")
"""Metrics that are told every `log_every` steps; all others that can be compared are told by validations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopConfig(Config):
    """The rule and what it compares: runs of one seed, at steps that all of them pass."""

    path = "stop"

    rule: Literal["median", "halving"] | None = None
    """`median`: a run ends whose best value so far is worse than the median over runs that are done of their means up to that step (Google
    Vizier). `halving`: of the runs that have come to a compared step the best in `factor` go on, at once and without waiting for others
    (asynchronous successive halving, 1810.05934). None trains every run to its end."""
    metric: Name = "loss/val"
    """What is compared: `loss/train`, or what a validation tells, as `task/mqar/accuracy`."""
    better: Literal["lower", "higher"] | None = None
    """Whether less of it is better, or more; None tells by its name: less of losses and error rates."""
    first: Steps = 100
    """The first step that is compared."""
    factor: Annotated[int, Whole(2, 1000)] = 2
    """halving: one run in so many goes on; compared are first, first x factor, first x factor^2, ..."""
    every: Steps | None = None
    """median: steps between comparisons after the first; None gives `first`."""
    least: Annotated[int, Whole(1, 10000)] = 3
    """median: runs that must be done before any is ended."""

    def compared(self, steps: int) -> tuple[int, ...]:
        """The steps of a run of so many at which it is compared; its last is none."""
        if self.rule == "median":
            return tuple(range(self.first, steps, self.every or self.first))
        found = []
        step = self.first
        while self.rule == "halving" and step < steps:
            found.append(step)
            step *= self.factor
        return tuple(found)

    def check_run(self, config: ExperimentConfig) -> None:
        """Raises ValueError where a run would not tell the metric at the steps compared."""
        if self.rule is None:
            return
        key = "log_every" if self.metric in TRAINING else "eval_every"
        every = getattr(config, key)
        steps = self.compared(config.steps)
        if not steps:
            raise ValueError(
                f"stop.first={self.first} is not before the last of steps={config.steps}; compare earlier, or train longer"
            )
        if every is None or (late := [step for step in steps if step % every]):
            told = "at the end only" if every is None else f"every {every} steps, and not at {late[0]}"
            raise ValueError(
                f"stop.metric={self.metric!r} is told {told} ({key}={every}); set {key} to a divisor of the steps compared, "
                f"{', '.join(map(str, steps[:4]))}{', ...' if steps[4:] else ''}"
            )

"""What may be otherwise when a run goes on: where it runs and what it keeps, and its number of steps as long as none that is done changes."""

from __future__ import annotations

import re
from pathlib import Path

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.train.optimizers.schedule import plateau
from plait.train.run_folder.contents import CHECKPOINTS, RunError

_FREE = ("out", "resume", "mesh", "log_every", "keep_last", "keep_best", "checkpoint_every", "wandb", "event")
A_PLACE = re.compile(r"data\.(cache_dir|source|sources\.[^.]+\.source)")
"""Leaves that may differ between hosts, and when a run goes on: they say where something lies. What lies there is told by its fingerprint."""

_TOKENS = ("data.tokenizer", "data.vocab_size")


def check_goes_on(saved: ExperimentConfig, config: ExperimentConfig, step: int, run: Path, *, other_data: bool = False) -> None:
    """Raises RunError where the steps up to checkpoint `step` of `run`, made with `saved`, are not those that `config` would have made;
    with `other_data`, on the data of `saved` and in its tokens."""
    free = lambda name: name == "steps" or name.split(".")[0] in _FREE or A_PLACE.fullmatch(name)
    lines = [line for line in codec.differences(codec.encode(saved), codec.encode(config)) if not free(_key(line))]
    read = lambda key: key.startswith("data.") and key not in _TOKENS
    if changed := [line for line in lines if not (other_data and read(_key(line)))]:
        raise RunError(
            f"out={str(run)!r} was started with another config: {'; '.join(changed)}; resume with the same values, or use another --out"
        )
    if saved.steps == config.steps:
        return
    if config.steps < step:
        raise RunError(f"steps={config.steps} is below the {step} that {str(run)!r} has done; use --steps {step} or more")
    if (same := steps_alike(saved, config, step)) < step:
        there = [one for one in checkpoint_steps(run) if one <= same]
        fix = (
            f"--branch {run}/{CHECKPOINTS}/{there[-1]} goes on from there in another --out"
            if there
            else f"no checkpoint up to there is kept (--keep-last); use --steps {saved.steps}"
        )
        raise RunError(
            f"steps={config.steps} gives another learning rate than steps={saved.steps} from step {same + 1} on "
            f"(optimizer.schedule={config.optimizer.schedule!r}), and the checkpoint is of step {step}; {fix}"
        )


def has_other_data(saved: ExperimentConfig, config: ExperimentConfig) -> bool:
    """Whether what is read, or how, was set to something else: it may still turn out to be the same data elsewhere."""
    keys = map(_key, codec.differences(codec.encode(saved), codec.encode(config)))
    return any(key.startswith("data.") and key != "data.cache_dir" for key in keys)


def _key(line: str) -> str:
    """The dotted path of a difference."""
    return line.split(":", maxsplit=1)[0]


def steps_alike(one: ExperimentConfig, other: ExperimentConfig, most: int) -> int:
    """How many of the first `most` steps have the same learning rate under two numbers of steps. Asks no device, as hosts do it alone."""
    ends = (plateau(config.optimizer, config.steps) for config in (one, other))
    return most if one.steps == other.steps else min([most, *(end + 1 for end in ends if end is not None)])


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run folder holds, ascending."""
    folder = run / CHECKPOINTS
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.is_dir() else []

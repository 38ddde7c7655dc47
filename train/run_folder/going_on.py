"""What may be otherwise when a run goes on: where it runs, what it keeps, how its rate falls, as long as no step that is done changes."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.train.optimizers.schedule import plateau
from plait.train.run_folder.contents import CHECKPOINTS, RunError

_FREE = ("out", "resume", "mesh", "log_every", "keep_last", "keep_best", "checkpoint_every", "wandb", "event")
A_PLACE = re.compile(r"data\.(cache_dir|source|sources\.[^.]+\.source)")
"""Leaves that may differ between hosts, and when a run goes on: they say where something lies. What lies there is told by its fingerprint."""

_THE_FALL = ("steps", "optimizer.schedule", "optimizer.decay_fraction", "optimizer.final_ratio")
"""Leaves that say when and how the learning rate falls, which steps before that do not depend on."""

_TOKENS = ("data.tokenizer", "data.vocab_size")


def check_goes_on(saved: ExperimentConfig, config: ExperimentConfig, step: int, run: Path, *, branch: bool = False) -> None:
    """Raises RunError where the steps up to checkpoint `step` of `run`, made with `saved`, are not those that `config` would have made; a
    branch may read other data from there on, in the tokens of `saved`."""
    free = lambda name: name in _THE_FALL or name.split(".")[0] in _FREE or A_PLACE.fullmatch(name)
    every = codec.differences(codec.encode(saved), codec.encode(config))
    read = lambda key: key.startswith("data.") and key not in _TOKENS
    if changed := [line for line in every if not (free(_key(line)) or (branch and read(_key(line))))]:
        said = "; ".join(changed)
        if branch:
            raise RunError(
                f"{str(run)!r} was started with another config: {said}; a branch may change data, steps and how the rate falls; give the "
                "run's values, or begin anew from its weights with --init-from"
            )
        raise RunError(
            f"out={str(run)!r} was started with another config: {said}; resume with the same values, or use another --out"
        )
    fall = [line for line in every if _key(line) in _THE_FALL]
    if not fall:
        return
    if config.steps < step:
        raise RunError(f"steps={config.steps} is below the {step} that {str(run)!r} has done; use --steps {step} or more")
    if (same := steps_alike(saved, config, step)) < step:
        there = [one for one in checkpoint_steps(run) if one <= same]
        fix = (
            f"--branch {run}/{CHECKPOINTS}/{there[-1]} goes on from there in another --out"
            if there
            else f"no checkpoint up to there is kept (--keep-last); use {_values(saved, fall)}"
        )
        raise RunError(
            f"{_values(config, fall)} gives another learning rate than {_values(saved, fall)} from step {same + 1} on "
            f"(optimizer.schedule={config.optimizer.schedule!r}), and the checkpoint is of step {step}; {fix}"
        )


def _values(config: ExperimentConfig, fall: list[str]) -> str:
    """What a config has where the fall of its rate differs, as `steps=40, optimizer.decay_fraction=0.2`."""
    return ", ".join(f"{key}={functools.reduce(getattr, key.split('.'), config)}" for key in map(_key, fall))


def has_other_data(saved: ExperimentConfig, config: ExperimentConfig) -> bool:
    """Whether what is read, or how, was set to something else: it may still turn out to be the same data elsewhere."""
    keys = map(_key, codec.differences(codec.encode(saved), codec.encode(config)))
    return any(key.startswith("data.") and key != "data.cache_dir" for key in keys)


def _key(line: str) -> str:
    """The dotted path of a difference."""
    return line.split(":", maxsplit=1)[0]


def steps_alike(one: ExperimentConfig, other: ExperimentConfig, most: int) -> int:
    """How many of the first `most` steps have the same learning rate where only its fall differs. Asks no device, as hosts do it alone."""
    falls = [(x.steps, x.optimizer.schedule, x.optimizer.decay_fraction, x.optimizer.final_ratio) for x in (one, other)]
    ends = (plateau(config.optimizer, config.steps) for config in (one, other))
    return most if falls[0] == falls[1] else min([most, *(end + 1 for end in ends if end is not None)])


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run folder holds, ascending."""
    folder = run / CHECKPOINTS
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.is_dir() else []

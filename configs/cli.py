"""From a command line to a config: a preset, then tyro overrides of any leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro

from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset
from plait.models.config import LMConfig, MixerTable, default_mixer
from plait.models.pattern import pattern_names

_PATTERN = "--model.pattern"


def parse_experiment(name: str, args: Sequence[str], prog: str = "launch.py train") -> ExperimentConfig:
    """The preset `name` with the overrides `args` (as in `--steps 200 --model.mixers.gla.num-heads 8`).

    A new `--model.pattern` is applied first, so that the options of its mixers exist. Raises ValueError for bad values; unknown options
    print the nearest ones and exit with status 2.
    """
    config = preset(name)
    if (pattern := _value_of(_PATTERN, args)) is not None:
        config = dataclasses.replace(config, model=_with_pattern(config.model, pattern))
    return tyro.cli(
        ExperimentConfig, default=config, args=list(args), prog=f"{prog} {name}", description=f"Options of preset {name}."
    )


def _with_pattern(model: LMConfig, pattern: str) -> LMConfig:
    """`model` over another pattern, unchecked: other options may still change the width, depth and heads that it must fit.

    tyro builds the final config from it, which is checked. Raises ValueError for names that are no mixers.
    """
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    mixers = MixerTable({name: model.mixers.get(name) or default_mixer(name) for name in pattern_names(pattern)})
    unchecked = object.__new__(LMConfig)
    for name, value in {**fields, "pattern": pattern, "mixers": mixers}.items():
        object.__setattr__(unchecked, name, value)
    return unchecked


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    """The last value given for `flag`, as `--flag value` or `--flag=value`."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value

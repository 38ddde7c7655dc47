"""From a command line to a config: a preset, then tyro overrides of any leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro

from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset

_PATTERN = "--model.pattern"


def parse_experiment(name: str, args: Sequence[str], prog: str = "launch.py train") -> ExperimentConfig:
    """The preset `name` with the overrides `args` (as in `--steps 200 --model.mixers.gla.num-heads 8`).

    A new `--model.pattern` is applied first, so that the options of its mixers exist. Raises ValueError for bad values; unknown options
    print the nearest ones and exit with status 2.
    """
    config = preset(name)
    if (pattern := _value_of(_PATTERN, args)) is not None:
        layers = _value_of("--model.num-layers", args) or _value_of("--model.num_layers", args)
        depth = int(layers) if layers is not None and layers.isdigit() else None
        config = dataclasses.replace(config, model=config.model.with_pattern(pattern, depth))
    return tyro.cli(
        ExperimentConfig, default=config, args=list(args), prog=f"{prog} {name}", description=f"Options of preset {name}."
    )


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    """The last value given for `flag`, as `--flag value` or `--flag=value`."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value

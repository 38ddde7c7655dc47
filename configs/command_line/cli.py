"""From a command line to a config: a preset, another pattern and other components where it names them, then any leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from plait.configs.command_line.exchange import component_flags, exchanged, offers, renamed, take
from plait.configs.command_line.words import parse
from plait.configs.components import at, unchecked, validate
from plait.configs.event import with_named
from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset
from plait.data.mixture.config import with_named_sources


def parse_experiment(name: str | ExperimentConfig, args: Sequence[str], prog: str = "launch.py train") -> ExperimentConfig:
    """The preset `name`, or an experiment, with the overrides `args` (as in `--steps 200 --optimizer muon --model.mixers.gla.num-heads 8`).

    A new `--model.pattern` is applied first and then the components that are named, so that the options of all of them exist. Raises
    ValueError for bad values and for words that are no options, naming the nearest.
    """
    return validate(unchecked_experiment(name, args, prog))


def unchecked_experiment(name: str | ExperimentConfig, args: Sequence[str], prog: str = "launch.py train") -> ExperimentConfig:
    """What `parse_experiment` gives, whose values may not go together."""
    words = list(args)
    config = preset(name) if isinstance(name, str) else name
    what, prog = (
        (f"preset {name}", f"{prog} {name}") if isinstance(name, str) else (f"a run from {name.init_from or name.folder}", prog)
    )
    with unchecked():
        if (pattern := take("model.pattern", words)) is not None:
            config = dataclasses.replace(config, model=at("model", config.model.with_pattern, pattern))
            at("model", config.model.complete)
        config = dataclasses.replace(config, event=with_named(config.event, words))
        sources = with_named_sources(config.data.sources, words)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
        before = config.model
        config = exchanged(config, words)
        flags = component_flags(config)
        config = parse(
            ExperimentConfig,
            words,
            default=config,
            prog=prog,
            description=f"Options of {what}. Before they are read, components are exchanged by name:\n\n{offers(flags)}",
            others=[flag for paths in flags.values() for flag in paths],
        )
        return dataclasses.replace(config, model=renamed(config.model, before))

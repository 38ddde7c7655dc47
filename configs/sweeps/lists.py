"""Lists of values on a command line: `--optimizer.learning-rate 1e-3,3e-3 --seed 0,1,2`.

A comma parts the values of numbers, switches, choices and names of components. A text, such as a pattern, may have commas of its own: it is
always one value, and a flag that is written several times has several, as in `--model.pattern "gla*3,softmax" --model.pattern softmax`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.configs.command_line import words as options
from plait.configs.command_line.cli import unchecked_experiment
from plait.configs.command_line.exchange import component_flags
from plait.configs.domains import shown
from plait.configs.event import with_named
from plait.configs.experiment import ExperimentConfig
from plait.configs.sweeps.rows import Rows, each, product, replaced, words

log = logging.getLogger("plait")

PATTERN = "model.pattern"
_NAME = object()
"""Stands for the annotation of what takes the name of a component."""


def multiplied(start: ExperimentConfig, rows: Rows, args: Sequence[str]) -> Rows:
    """The rows with each combination of the values that `args` lists, in place of their own values of those keys.

    Args:
        start: what the rows are overrides of.
        args: words of a command line.

    Raises:
        ValueError: a word is no flag, or a list has an empty value.
    """
    given = _given(args)
    if len(once := given.get(PATTERN, [])) == 1 and "," in once[0]:
        log.info(
            "%s %s is one pattern, whose layers commas part; to compare several, write the flag once for each",
            PATTERN,
            shown(once[0]),
        )
    start = dataclasses.replace(start, event=with_named(start.event, args))
    known: dict[str, Any] = {}
    axes: dict[str, Rows] = {}
    trials: Iterable[Any] = ({}, *rows)
    while True:
        _learn(known, start, trials)
        new = {key: _axis(key, texts, known[key]) for key, texts in given.items() if key not in axes and key in known}
        axes |= new
        structure = [axis for key, axis in axes.items() if key == PATTERN or known[key] is _NAME]
        if not new or not structure or len(axes) == len(given):
            break
        trials = [merged for row in product(*structure) for merged in replaced(rows, row)]  # in them further keys may exist
    axes |= {key: each(key, *texts) for key, texts in given.items() if key not in axes}
    return tuple(row for lists in product(*(axes[key] for key in given)) for row in replaced(rows, lists))


def _given(args: Sequence[str]) -> dict[str, list[Any]]:
    """What is written behind each flag, by dotted key; a truth value where nothing is."""
    found: dict[str, list[Any]] = {}
    left = list(args)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not re.match("--[A-Za-z]", name):
            raise ValueError(f"{shown(word)} is no option; write --KEY VALUE[,VALUE...], as in --seed 0,1,2")
        key = name[2:].replace("-", "_")
        if equals:
            found.setdefault(key, []).append(value)
        elif left and not re.match("--[A-Za-z]", left[0]):
            found.setdefault(key, []).append(left.pop(0))
        else:
            owner, dot, last = key.rpartition(".")
            found.setdefault(owner + dot + last.removeprefix("no_"), []).append(not last.startswith("no_"))
    return found


def _learn(known: dict[str, Any], start: ExperimentConfig, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds what the experiments of some rows can be told: the annotation of each key, `_NAME` for components."""
    for row in rows:
        try:
            config = unchecked_experiment(start, words(row))
        except ValueError:  # said of the row, when all are read
            continue
        flags = {name: _NAME for names in component_flags(config).values() for name in names} | options.hints(config)
        known |= {name[2:].replace("-", "_"): hint for name, hint in flags.items() if name[2:].replace("-", "_") not in known}


def _axis(key: str, texts: Sequence[Any], hint: Any) -> Rows:
    values: list[Any] = []
    for text in texts:
        pieces = [piece.strip() for piece in text.split(",")] if isinstance(text, str) and _parts_at_commas(hint) else [text]
        if "" in pieces and len(pieces) > 1:
            raise ValueError(f"{key}={shown(text)} has an empty value; leave out the comma")
        truths = {"True": True, "False": False} if hint is bool else {}
        values += [truths.get(piece, piece) for piece in pieces]
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{key} has the value {shown(twice[0])} twice; give each once, or use --seeds to repeat runs")
    return each(key, *values)


def _parts_at_commas(hint: Any) -> bool:
    kinds = (hint, *typing.get_args(hint))
    inner = [typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind for kind in kinds]
    return hint is _NAME or not any(kind is str or typing.get_origin(kind) is tuple for kind in inner)

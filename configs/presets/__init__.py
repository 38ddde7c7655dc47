"""Presets: functions that return a whole experiment. A module's public functions are its presets; the name is the function's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from plait.configs.experiment import ExperimentConfig

Preset = Callable[[], ExperimentConfig]


def presets() -> dict[str, Preset]:
    """Every preset by name, sorted by module."""
    found: dict[str, Preset] = {}
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == info.name and not name.startswith("_"):
                found[name] = function
    return found


def preset(name: str) -> ExperimentConfig:
    """The experiment of a preset. Raises ValueError naming the nearest ones."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"preset {name!r} does not exist; {hint}")
    return known[name]()

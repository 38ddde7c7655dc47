"""Layers that are sparse by name and see all of a row, because it is short."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from plait.configs.command_line.words import flag
from plait.configs.components import children
from plait.configs.experiment import ExperimentConfig
from plait.models.mixers.base import MixerConfig, WrapperConfig

_MUCH_LONGER, _SMALL = 64, 32


def whole_rows(config: ExperimentConfig) -> list[str]:
    """A sentence on each sparse mixer and each window whose queries see all tokens of a row up to their own, with what would be less. A
    mixer of which neither a smaller option nor a longer row would is one that is meant to see all."""
    width, length, found = config.model.d_model, config.data.seq_len, []
    for path, mixer in _mixers(config.model, "model"):
        if mixer.told_as not in ("sparse", "window") or not mixer.sees_whole(width, length):
            continue
        limits = _limits(mixer, width, length)
        if not limits and mixer.sees_whole(width, _MUCH_LONGER * length):
            continue
        options = "".join(f"{flag(f'{path}.{name}')} {less} or less, " for name, less in limits.items())
        having = ", ".join(f"{name}={getattr(mixer, name)}" for name in limits)
        found.append(
            f"{mixer.name} ({path}) sees all of a row of {length} tokens, as full attention does{having and f', with {having}'}; "
            f"use {options and f'{options}or '}a longer --data.seq-len"
        )
    return found


def _mixers(config: Any, path: str) -> Iterator[tuple[str, MixerConfig]]:
    """Those of a config that are around no other."""
    for key, child in children(config):
        if isinstance(child, MixerConfig) and not isinstance(child, WrapperConfig):
            yield f"{path}.{key}", child
        yield from _mixers(child, f"{path}.{key}")


def _limits(mixer: MixerConfig, width: int, length: int) -> dict[str, int]:
    """The options of which a smaller value by itself leaves tokens out, with such a value: theirs halved again and again, or a small one."""
    settled, found = mixer.settled(width), {}
    for name in (field.name for field in dataclasses.fields(mixer)):
        value = getattr(settled, name)
        if type(value) is not int:
            continue
        halved = [value >> times for times in range(1, value.bit_length())]
        for less in (*halved, *range(min(value - 1, _SMALL), 0, -1)):
            try:
                whole = dataclasses.replace(settled, **{name: less}).sees_whole(width, length)
            except ValueError:  # options that do not go together
                continue
            if not whole:
                found[name] = less
                break
    return found

"""Layers that are sparse by name and see all of a row, because it is short or because an option says so."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from plait.configs.command_line.words import flag
from plait.configs.components import children
from plait.configs.experiment import ExperimentConfig
from plait.models.mixers.base import MixerConfig, WrapperConfig

_MUCH_LONGER, _SMALL = 64, 32


def whole_rows(config: ExperimentConfig) -> list[str]:
    """A sentence on each sparse mixer and each window whose queries see all tokens of a row up to their own, with what would be less; and
    on each that does so in rows without certain tokens. A mixer of which neither other options nor a longer row would see less is one
    that is meant to see all."""
    width, length, found = config.model.d_model, config.data.seq_len, []
    for path, mixer in _mixers(config.model, "model"):
        if mixer.told_as not in ("sparse", "window"):
            continue
        if without := mixer.whole_without:
            ids = " and ".join(f"{name}={one}" for name, one in without.items())
            flags = " and ".join(flag(f"{path}.{name}") for name in without)
            found.append(
                f"{mixer.name} ({path}) sees all of a row without tokens {ids}, as full attention does; use {flags} of tokens that "
                "stand in the data"
            )
        if not mixer.sees_whole(width, length):
            continue
        having = list(dict.fromkeys(name for limit in _limits(mixer, width, length) for name in limit))
        ways = _ways(mixer, path, width, length)
        if not ways:
            having, ways = _choices(mixer, path, width, length)
        if ways:
            options = ", ".join(f"{name}={getattr(mixer, name)}" for name in having)
            use = f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 1 else ways[0]
            found.append(
                f"{mixer.name} ({path}) sees all of a row of {length} tokens, as full attention does{options and f', with {options}'}; "
                f"use {use}"
            )
    return found


def _mixers(config: Any, path: str) -> Iterator[tuple[str, MixerConfig]]:
    """Those of a config that are around no other."""
    for key, child in children(config):
        if isinstance(child, MixerConfig) and not isinstance(child, WrapperConfig):
            yield f"{path}.{key}", child
        yield from _mixers(child, f"{path}.{key}")


def _ways(mixer: MixerConfig, path: str, width: int, length: int) -> list[str]:
    """What would leave tokens out: a smaller option, a longer row."""
    limits = _limits(mixer, width, length)
    ways = [" with ".join(f"{flag(f'{path}.{name}')} {less} or less" for name, less in limit.items()) for limit in limits]
    return ways if mixer.sees_whole(width, _MUCH_LONGER * length) else [*ways, "a longer --data.seq-len"]


def _limits(mixer: MixerConfig, width: int, length: int) -> list[dict[str, int]]:
    """Options of which smaller values leave tokens out, with such values: each by itself, or where none does so, two together."""
    settled = mixer.settled(width)
    smaller = {name: _smaller(value) for name, value in _counts(settled, length).items()}
    whole = lambda options: _whole(settled, options, width, length)
    fewer = lambda name, others: ({**others, name: less} for less in smaller[name] if whole({**others, name: less}) is False)
    if alone := [limit for name in smaller for limit in itertools.islice(fewer(name, {}), 1)]:
        return alone
    valid = {name: [less for less in values if whole({name: less}) is not None] for name, values in smaller.items()}
    found = []
    for one, other in itertools.combinations([name for name, values in valid.items() if values], 2):
        for limit in itertools.islice(fewer(one, {other: valid[other][-1]}), 1):
            found.append(next(fewer(other, {one: limit[one]})))
    return found


def _counts(settled: MixerConfig, length: int) -> dict[str, int]:
    """Whole numbers among its options; where there may be one and is none, the row's length."""
    values = {
        name: length if (value := getattr(settled, name)) is None and int in kinds else value
        for name, kinds in _kinds(settled).items()
    }
    return {name: value for name, value in values.items() if type(value) is int}


def _smaller(value: int) -> list[int]:
    """Of a number the halves, halves of those and so on, then small ones."""
    return [*(value >> times for times in range(1, value.bit_length())), *range(min(value - 1, _SMALL), 0, -1)]


def _choices(mixer: MixerConfig, path: str, width: int, length: int) -> tuple[list[str], list[str]]:
    """Names of options of which another choice leaves tokens out, by itself or with what `_ways` would do then; and how."""
    settled, names, found = mixer.settled(width), [], []
    for name, kinds in _kinds(mixer).items():
        value = getattr(settled, name)
        for choice in (kind for kind in kinds if isinstance(kind, str) and isinstance(value, str) and kind != value):
            whole = _whole(settled, {name: choice}, width, length)
            if whole is None:
                continue
            more = _ways(dataclasses.replace(settled, **{name: choice}), path, width, length) if whole else []
            if more or not whole:
                names.append(name)
                found.append(" with ".join([f"{flag(f'{path}.{name}')} {choice}", *([" or ".join(more)] if more else [])]))
    return names, found


def _kinds(mixer: MixerConfig) -> Mapping[str, tuple[Any, ...]]:
    """By field, what its type is one of: types, and the values of a `Literal`."""
    hints = typing.get_type_hints(type(mixer))
    return {field.name: typing.get_args(hints[field.name]) for field in dataclasses.fields(mixer)}


def _whole(mixer: MixerConfig, options: Mapping[str, Any], width: int, length: int) -> bool | None:
    """Whether it would see all with these options; None where they do not go together."""
    try:
        return dataclasses.replace(mixer, **options).sees_whole(width, length)
    except ValueError:
        return None

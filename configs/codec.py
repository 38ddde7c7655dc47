"""Config trees to JSON and back, strictly: nothing unknown, missing or of another type passes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from plait.configs.components import ConfigError
from plait.configs.files import write_atomically
from plait.models.mixers.base import MIXERS, MixerConfig

T = TypeVar("T")
_TAG = "mixer_name"  # the registry name of a mixer config, whose field is annotated with the base class


def encode(config: Any) -> Any:
    """A config (dataclass, mapping or scalar) as JSON values; mixers carry their registry name."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: encode(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {_TAG: config.name, **fields} if isinstance(config, MixerConfig) else fields
    if isinstance(config, Mapping):
        return {key: encode(value) for key, value in config.items()}
    return config


def decode(schema: type[T], value: Any, path: str = "config") -> T:
    """`value` read as `schema`. Raises ConfigError with the dotted path, the value and the rule."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None  # type: ignore[return-value]
        options = [a for a in args if a is not type(None)]
        return decode(options[0], value, path) if len(options) == 1 else _first(options, value, path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}={value!r} must be one of {', '.join(map(repr, args))}{_near(str(value), map(str, args))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        return {key: decode(args[1], item, f"{path}.{key}") for key, item in _mapping(value, path).items()}  # type: ignore[return-value]
    if schema is MixerConfig:
        fields = dict(_mapping(value, path))
        name = fields.pop(_TAG, None)
        if not isinstance(name, str):
            raise ConfigError(f"{path} has no {_TAG!r}; it must name the mixer it configures")
        try:
            return _dataclass(MIXERS[name], fields, path)  # type: ignore[return-value]
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    if dataclasses.is_dataclass(schema):
        return _dataclass(schema, _mapping(value, path), path)
    if schema is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # type: ignore[return-value]
    if type(value) is not schema:
        raise ConfigError(f"{path}={value!r} must be of type {schema.__name__}, not {type(value).__name__}")
    return value


def save(config: Any, path: Path) -> None:
    """Writes `config` as JSON, all of it or nothing."""
    write_atomically(path, json.dumps(encode(config), indent=2) + "\n")


def load(schema: type[T], path: Path) -> T:
    """Reads `path` as `schema`. Raises ConfigError for a missing file, text that is not JSON, or a tree that does not fit."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a run folder with its config.json") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    try:
        return decode(schema, value)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Leaves in which two encoded configs differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of an encoded config by dotted path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in leaves(value, f"{path}.{key}" if path else key).items()}


def _dataclass(schema: type[T], fields: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in fields:
        if key in getattr(schema, "reserved", {}):
            raise ConfigError(f"{path}.{key} {schema.reserved[key]}")  # type: ignore[attr-defined]
        if key not in known:
            raise ConfigError(
                f"{path}.{key} is not a field of {schema.__name__}{_near(key, known) or '; it has ' + ', '.join(known)}"
            )
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in fields:
            raise ConfigError(f"{path}.{name} is missing")
    return schema(**{key: decode(hints[key], value, f"{path}.{key}") for key, value in fields.items()})


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}={value!r} must be an object of named fields")
    return value


def _first(options: list[Any], value: Any, path: str) -> Any:
    for option in options:
        try:
            return decode(option, value, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}={value!r} must be one of the types {', '.join(getattr(o, '__name__', str(o)) for o in options)}")


def _near(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

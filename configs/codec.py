"""Config trees to JSON and back, strictly: nothing unknown, missing or of another type passes, and what is written can be read.

A component carries the name it is registered under, keyed by its kind (`mixer_name`, `optimizer_name`), so that it is read back
whatever the field that holds it is annotated with. Everything else is told by the annotations.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from plait.configs.components import (
    Component,
    Config,
    ConfigError,
    Registry,
    a,
    default_of,
    registries,
    registry_of,
    unchecked,
    validate,
)
from plait.configs.domains import choices, fix, shown
from plait.configs.files import parse_json, read_json, write_atomically

T = TypeVar("T")


def encode(config: Any, path: str = "config") -> Any:
    """A config tree as JSON values; tuples become lists. Raises ConfigError for what could not be read back."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: encode(getattr(config, f.name), f"{path}.{f.name}") for f in dataclasses.fields(config)}
        return {**_tag(config, path), **fields} if isinstance(config, Component) else fields
    if isinstance(config, Mapping):
        return {key: encode(value, f"{path}.{key}") for key, value in config.items()}
    if isinstance(config, tuple):
        return [encode(value, f"{path}.{index}") for index, value in enumerate(config)]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ConfigError(f"{path}={shown(config)} has no JSON form; use numbers, text, tuples, mappings and configs")


def decode(schema: type[T], value: Any, path: str = "config") -> T:
    """`value` read as `schema`, and checked. Raises ConfigError with the dotted path, the value and the rule."""
    with unchecked():
        found: Any = _read(schema, value, path)
    if isinstance(found, Config):
        validate(found, path)
    return found


def save(config: Any, path: Path) -> None:
    """Writes `config` as JSON, all of it or nothing. Raises ConfigError when it would not be read back as it is."""
    text = json.dumps(encode(config), indent=2)
    read = decode(type(config), parse_json(text))
    if read != config:
        lost = [f.name for f in dataclasses.fields(config) if getattr(read, f.name) != getattr(config, f.name)]
        raise ConfigError(f"config.{', config.'.join(lost)} would be read back otherwise; annotate the fields as what they hold")
    write_atomically(path, text + "\n")


def load(schema: type[T], path: Path) -> T:
    """A JSON file read as `schema`: a config, any other dataclass, or a type such as `dict[str, tuple[int, int]]`.

    Raises:
        ConfigError: it is not there, is not JSON, or does not fit; the message begins with the path.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the folder that has it") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return decode(schema, value, path.stem)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Leaves in which two encoded configs differ, as `path: old -> new`."""
    if type(old) is type(new) and isinstance(old, Mapping | list):
        before, after = dict(_items(old)), dict(_items(new))
        keys = dict.fromkeys([*before, *after])
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of an encoded config by dotted path."""
    if not isinstance(tree, Mapping | list):
        return {path: tree}
    return {name: leaf for key, value in _items(tree) for name, leaf in leaves(value, f"{path}.{key}" if path else key).items()}


def _items(tree: Mapping[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    return iter(tree.items()) if isinstance(tree, Mapping) else ((str(index), item) for index, item in enumerate(tree))


def _read(schema: Any, value: Any, path: str, default: Any = dataclasses.MISSING) -> Any:
    """`value` as `schema`, unchecked; `default` is that of the field that holds it."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [one for one in args if one is not type(None)]
        return _read(options[0], value, path, default) if len(options) == 1 else _first(options, value, path, default)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}={shown(value)} must be one of {', '.join(map(repr, args))}; {fix(schema, default, value)}")
        return value
    if schema in (Any, object):
        return _anything(value, path, default)
    if schema is tuple or origin is tuple:
        return _tuple(args or (Any, ...), value, path)
    if isinstance(container := origin or schema, type) and issubclass(container, Mapping):
        inner = args[1] if args else Any
        return {key: _read(inner, item, f"{path}.{key}") for key, item in _mapping(value, path).items()}
    if isinstance(schema, type) and issubclass(schema, Component):
        return _component(schema, value, path, default)
    if isinstance(schema, type) and dataclasses.is_dataclass(schema):
        return _dataclass(schema, _mapping(value, path), path)
    if schema is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}={shown(value)} must be a number below 1e308; {fix(schema, default, value)}") from None
    if type(value) is not schema:
        raise ConfigError(
            f"{path}={shown(value)} must be of type {schema.__name__}, not {type(value).__name__}; {fix(schema, default, value)}"
        )
    return value


def _anything(value: Any, path: str, default: Any) -> Any:
    if isinstance(value, Mapping):
        if _tags(value) or isinstance(default, Component):
            return _component(Component, value, path, default)
        return {key: _anything(item, f"{path}.{key}", None) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_anything(item, f"{path}.{index}", None) for index, item in enumerate(value))
    return value


def _tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}={shown(value)} must be a list; use [...]")
    if args[-1] is Ellipsis:
        args = args[:1] * len(value)
    if len(value) != len(args):
        raise ConfigError(f"{path} has {len(value)} entries; it must have {len(args)}; give as many")
    return tuple(_read(arg, item, f"{path}.{index}") for index, (arg, item) in enumerate(zip(args, value, strict=True)))


def _component(schema: type[Component], value: Any, path: str, default: Any) -> Any:
    """The component that `value` names; without a name that of the annotation, else that of the field's default."""
    fields = dict(_mapping(value, path))
    kind = registry_of(schema) if schema is not Component else None
    tags = _tags(fields)
    if not tags:
        if kind is not None and kind.holds(schema):
            return _dataclass(schema, fields, path)
        if isinstance(default, schema):
            return _dataclass(type(default), fields, path)
        tag, what = (kind.tag, kind.kind) if kind is not None else ("kind_name", "component")
        raise ConfigError(f"{path} has no {tag!r}; it must name the {what} it configures")
    registry = tags[0]
    name = fields.pop(registry.tag)
    if not isinstance(name, str):
        raise ConfigError(
            f"{path}.{registry.tag}={name!r} must be the name of {a(registry.kind)}; use one of {choices(list(registry.all()))}"
        )
    try:
        found = registry[name]
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not issubclass(found, schema):
        wanted = f"the {kind.kind} {schema.name!r}" if kind and kind.holds(schema) else a(kind.kind if kind else schema.__name__)
        raise ConfigError(f"{path} is the {registry.kind} {name!r}; it must be {wanted}; name one of those")
    return _dataclass(found, fields, path)


def _tags(fields: Mapping[str, Any]) -> list[Registry[Any]]:
    return [registry for registry in registries.values() if registry.tag in fields]


def _tag(config: Component, path: str) -> dict[str, str]:
    registry = registries.get(getattr(config, "kind_of_component", ""))
    if registry is None or not registry.holds(type(config)):
        raise ConfigError(f"{path} is {a(type(config).__name__)}, which could not be read back; register the class under a name")
    return {registry.tag: config.name}


_hints = functools.cache(typing.get_type_hints)


def _dataclass(schema: type[T], fields: Mapping[str, Any], path: str) -> T:
    fields = schema.upgraded(fields) if issubclass(schema, Config) else fields
    hints = _hints(schema)  # type: ignore[arg-type]
    known = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in fields:
        if key not in known:
            raise ConfigError(
                f"{path}.{key} is not a field of {schema.__name__}{_near(key, known) or '; it has ' + ', '.join(known)}"
            )
    for name, field in known.items():
        if default_of(field) is dataclasses.MISSING and name not in fields:
            raise ConfigError(f"{path}.{name} is missing; give it a value")
    return schema(**{key: _read(hints[key], value, f"{path}.{key}", default_of(known[key])) for key, value in fields.items()})


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}={shown(value)} must be an object of named fields; use {{...}}")
    return value


def _first(options: list[Any], value: Any, path: str, default: Any) -> Any:
    for option in options:
        try:
            return _read(option, value, path, default)
        except ConfigError:
            continue
    names = ", ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{path}={shown(value)} must be one of the types {names}; {fix(options[0], default, value)}")


def _near(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""

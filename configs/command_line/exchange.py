"""Components exchanged by name: `--optimizer muon`, `--model.channel-mixer moe`, `--model.mixers.parallel.parts.1 gla`."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from plait.configs.command_line.words import flag
from plait.configs.components import Component, Config, Registry, a, at, children, default_of, registries, registry_of, validate
from plait.models.config import LMConfig, default_mixer, pattern_name
from plait.models.mixers.base import MIXERS

C = TypeVar("C", bound=Config)


def exchanged(config: C, words: list[str]) -> C:
    """`config` with the components that `words` name in place of others, outermost first; those words are removed. To be called unchecked."""
    return _exchanged(config, type(config), "", words)


def renamed(model: LMConfig, before: LMConfig) -> LMConfig:
    """`model`, whose pattern calls mixers that were exchanged since `before` by what they are now.

    Raises:
        ValueError: such a mixer does not fit, or the pattern has its new name already; by the name it was exchanged under.
    """
    names = {key: key for key in model.mixers}
    for key, mixer in model.mixers.items():
        if pattern_name(mixer) != pattern_name(before.mixers[key]):
            at(f"model.mixers.{key}", validate(mixer, f"model.mixers.{key}").fit, model.d_model)
            _, slash, label = key.partition("/")
            names[key] = pattern_name(mixer) + slash + label
    taken = list(names.values())
    for old, new in names.items():
        if old != new and taken.count(new) > 1:
            raise ValueError(
                f"model.mixers.{old}={new!r} is in pattern={model.pattern!r} already; tell them apart there, as in 'gla,gla/wide'"
            )
    pattern = re.sub(r"[a-z0-9_+/]+", lambda word: names.get(word[0], word[0]), model.pattern)
    return dataclasses.replace(model, pattern=pattern, mixers={names[key]: mixer for key, mixer in model.mixers.items()})


def component_flags(config: Config) -> dict[str, list[str]]:
    """The flags that exchange the components of a config, by kind."""
    flags: dict[str, list[str]] = {}

    def note(config: Config, path: str) -> None:
        for key, child in children(config):
            if isinstance(child, Component):
                flags.setdefault(child.kind_of_component, []).append(flag(path + key))
            note(child, f"{path}{key}.")
        for key, names in config.open_keys().items():
            kind = _kind_of_table(typing.get_type_hints(type(config))[key])
            flags.setdefault(kind.kind, []).extend(flag(f"{path}{key}.{name}") for name in names)

    note(config, "")
    return flags


def offers(flags: Mapping[str, list[str]]) -> str:
    """Flags that exchange components, with the names that they take."""
    return "\n\n".join(f"{', '.join(paths)}: {', '.join(registries[kind].all())}" for kind, paths in flags.items())


def take(path: str, words: list[str]) -> str | None:
    """The last value given for `path`, as `--path value` or `--path=value`; all are removed from `words`. Raises ValueError for none."""
    found = None
    for index in reversed(range(len(words))):
        name, equals, value = words[index].partition("=")
        if not name.startswith("--") or flag(name[2:]) != flag(path):
            continue
        if not equals and (index + 1 == len(words) or words[index + 1].startswith("--")):
            raise ValueError(f"{path} has no value; write one after {flag(path)}")
        given = value if equals else words[index + 1]
        found = given if found is None else found
        del words[index : index + (1 if equals else 2)]
    return found


def _exchanged(value: Any, hint: Any, path: str, words: list[str]) -> Any:
    """`value`, of a field annotated with `hint`; the same object where nothing in it is exchanged."""
    kind = registries[value.kind_of_component] if isinstance(value, Component) else _kind(hint) if value is None else None
    if kind is not None and (name := take(path, words)) is not None:
        value = _made(kind, name, value, hint, path)
    parts: dict[Any, tuple[Any, Any]] = {}  # with their annotations
    if isinstance(value, Mapping):
        inner = _inside(hint, Mapping)[-1]
        parts = {key: (item, inner) for key, item in value.items()}
    elif isinstance(value, tuple):
        hints = [arg for arg in _inside(hint, tuple) if arg is not Ellipsis]
        parts = {index: (item, hints[min(index, len(hints) - 1)]) for index, item in enumerate(value)}
    elif isinstance(value, Config):
        fields = typing.get_type_hints(type(value))
        parts = {field.name: (getattr(value, field.name), fields[field.name]) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    under = lambda key: f"{path}.{key}" if path else str(key)
    new = {key: _exchanged(item, inner, under(key), words) for key, (item, inner) in parts.items()}
    if isinstance(value, Config):
        for key, names in value.open_keys().items():
            given = _given(names, parts[key][1], under(key), words)
            new[key] = {**new[key], **given} if given else new[key]
    if all(new[key] is item for key, (item, _) in parts.items()):
        return value
    if isinstance(value, Config):
        return dataclasses.replace(value, **new)  # type: ignore[type-var]
    return tuple(new.values()) if isinstance(value, tuple) else new


def _given(names: Sequence[str], hint: Any, path: str, words: list[str]) -> dict[str, Component | None]:
    """The components that `words` give to a table at `path` by some of the names, of which it has none yet."""
    kind, inner = _kind_of_table(hint), _inside(hint, Mapping)[-1]
    given = {name: take(f"{path}.{name}", words) for name in names}
    return {name: _made(kind, word, None, inner, f"{path}.{name}") for name, word in given.items() if word is not None}


def _made(kind: Registry[Any], name: str, old: Component | None, hint: Any, path: str) -> Component | None:
    """The component `name`, with the values that `old` has for options that both have from one base."""
    if name == "None" and type(None) in _options(hint):
        return None
    if kind is MIXERS and "/" in name:
        raise ValueError(f"{path}={name!r} has a label, and the place has its own; use {name.partition('/')[0]!r}")
    try:
        made = default_mixer(name) if kind is MIXERS else kind[name]()
    except ValueError as error:
        raise ValueError(f"{path}={name!r}: {error}") from None
    classes = _classes(hint)
    if classes and not isinstance(made, classes):
        raise ValueError(f"{path}={name!r} must be {' or '.join(a(one.__name__) for one in classes)}; name one of those")
    base = next(one for one in type(old).__mro__ if isinstance(made, one))
    if not dataclasses.is_dataclass(base):
        return made
    defaults = {field.name: default_of(field) for field in dataclasses.fields(made)}
    shared = {f.name: getattr(old, f.name) for f in dataclasses.fields(base) if default_of(f) == defaults[f.name]}
    return dataclasses.replace(made, **{key: value for key, value in shared.items() if not isinstance(value, Component)})


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _classes(hint: Any) -> tuple[type[Component], ...]:
    return tuple(one for one in _options(hint) if isinstance(one, type) and issubclass(one, Component))


def _inside(hint: Any, container: type) -> tuple[Any, ...]:
    """What a container in a field of this annotation holds."""
    origins = {one: typing.get_origin(one) for one in _options(hint)}
    found = [one for one, origin in origins.items() if isinstance(origin, type) and issubclass(origin, container)]
    return typing.get_args(found[0]) if found else (Any,)


def _kind(hint: Any) -> Registry[Any] | None:
    classes = _classes(hint)
    return registry_of(classes[0]) if classes else None


def _kind_of_table(hint: Any) -> Registry[Any]:
    """That of the components in a table of this annotation."""
    return typing.cast(Registry[Any], _kind(_inside(hint, Mapping)[-1]))

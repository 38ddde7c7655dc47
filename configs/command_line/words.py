"""Words of a command line read as a dataclass: every flag is a field by its dotted path, and every error is one line.

`--model.d-model 64`, `--model.d-model=64`, `--resume` and `--no-resume`; a dash stands for an underscore. tyro prints the help.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from plait.configs.components import Component, Config, at, default_of
from plait.configs.domains import check_leaves, domain_of, fix, hints_of, shown
from plait.data.remote.address import Address

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}


@dataclasses.dataclass(frozen=True)
class Option:
    """A leaf that words can set."""

    path: str
    """Dotted, from the dataclass that is read."""
    hint: Any
    default: Any

    @property
    def plain(self) -> Any:
        """The annotation without its domain."""
        return typing.get_args(self.hint)[0] if typing.get_origin(self.hint) is Annotated else self.hint

    @property
    def is_positional(self) -> bool:
        return tyro.conf.Positional in getattr(self.hint, "__metadata__", ())

    @property
    def is_repeated(self) -> bool:
        return typing.get_origin(self.plain) is tuple


def parse(
    schema: type[T],
    words: Sequence[str],
    *,
    prog: str,
    default: T | None = None,
    prefix: str = "",
    description: str | None = None,
    others: Iterable[str] = (),
) -> T:
    """`words` as a `schema`: `default` with what they set, or a new one. A path may be the address of a store where `schema.ADDRESSES` has its
    name. `--help` prints the options and exits with status 0.

    Args:
        prog: the command, for the help.
        prefix: what every flag begins with, as `hosts.`.
        others: flags that somebody else reads, to be suggested too.

    Raises:
        ValueError: a word that is no option, has no value or a wrong one; a required option that is not there.
    """
    if not prefix and {"-h", "--help"} & set(words):
        tyro.cli(
            schema, default=default, args=["--help"], prog=prog, description=description, config=(tyro.conf.AvoidSubcommands,)
        )
    found = _read(list(_options(schema, default)), words, prog, prefix, tuple(others))
    if default is not None:
        made = _replaced(default, found)
    else:
        for option in _options(schema, None):
            if option.default is dataclasses.MISSING and option.path not in found:
                how = f"after {prog!r}" if option.is_positional else f"after {flag(prefix + option.path)}"
                raise ValueError(f"{prefix}{option.path} is missing; write it {how}")
        own = {path: value for path, value in found.items() if "." not in path}
        made = _replaced(schema(**own), {path: value for path, value in found.items() if path not in own})
    if not isinstance(made, Config):
        at(prefix.rstrip("."), check_leaves, made)
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            if (
                isinstance(value, Path)
                and field.name not in getattr(schema, "ADDRESSES", ())
                and (address := Address.of(value)) is not None
            ):
                raise ValueError(
                    f"{prefix}{field.name}={str(address)!r} must be on this machine; give a path, and copy what is there"
                )
    return made


def flag(path: str) -> str:
    """The flag of a dotted path."""
    return f"--{path.replace('_', '-')}"


def hints(config: Any) -> dict[str, Any]:
    """The annotation, without its domain, of what each flag sets in a config."""
    return {flag(one.path): one.plain for one in _options(type(config), config)}


def _options(schema: type, default: Any) -> Iterator[Option]:
    for field in dataclasses.fields(schema):
        value = default_of(field) if default is None else getattr(default, field.name)
        yield from _inside(field.name, hints_of(schema)[field.name], value)


def _inside(path: str, hint: Any, value: Any) -> Iterator[Option]:
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Config):
        yield from (dataclasses.replace(one, path=f"{path}.{one.path}") for one in _options(type(value), value))
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and any(isinstance(one, Config) for one in value):
        items = enumerate(value)
    elif not any(isinstance(one, type) and issubclass(one, Component) for one in (hint, *typing.get_args(hint))):
        yield Option(path, hint, value)
    for key, item in items:
        yield from _inside(f"{path}.{key}", type(item), item)


def _read(options: Sequence[Option], words: Sequence[str], prog: str, prefix: str, others: Sequence[str]) -> dict[str, Any]:
    """The values that words set, by path."""
    valued = {flag(prefix + one.path): one for one in options if one.plain is not bool and not one.is_positional}
    switches = {
        flag(f"{prefix}{owner}{dot}{no}{name}"): (one, not no)
        for one in options
        if one.plain is bool
        for owner, dot, name in [one.path.rpartition(".")]
        for no in ("", "no-")
    }
    places = [one for one in options if one.is_positional]
    known = [*valued, *switches, *others]
    found: dict[str, Any] = {}

    def put(option: Option, text: str) -> None:
        value = _value(option, text, prefix)
        found[option.path] = (*found.get(option.path, ()), value) if option.is_repeated else value

    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.partition("=")
        name = name.replace("_", "-")
        if name in switches:
            option, value = switches[name]
            if equals or (left and left[0] in ("True", "False")):
                raise ValueError(
                    f"{prefix}{option.path}={shown(text if equals else left[0])} is a switch and takes no value; "
                    f"use {' or '.join(one for one, (other, _) in switches.items() if other is option)}"
                )
            found[option.path] = value
        elif name in valued:
            option = valued[name]
            if not equals:
                if not left or re.match("--[A-Za-z]", left[0]):
                    raise ValueError(f"{prefix}{option.path} has no value; write one after {name}, or {name}=VALUE")
                text = left.pop(0)
            put(option, text)
        elif places and not re.match("-[-A-Za-z]", word):
            put(places[0], word)
            places = places if places[0].is_repeated else places[1:]
        else:
            raise ValueError(f"{shown(word)} is not an option of '{prog}'; {_near(name, known, prog)}")
    return found


def _near(name: str, known: Sequence[str], prog: str) -> str:
    if not name.startswith("-"):
        return "a value that has spaces stands in quotes"
    last = {one: one.lstrip("-").rpartition(".")[2] for one in known}
    owner, dot, word = name.lstrip("-").rpartition(".")
    there = [one for one in known if one.startswith(f"--{owner}{dot}")]
    near = (
        [one for one in known if one.endswith(f".{owner}{dot}{word}")]
        or [one for one in there if len(word) > 1 and word == "".join(part[0] for part in last[one].split("-") if part)]  # --lr
        or [one for one in there if len(word) > 3 and word in last[one].split("-")]  # --batch
        or difflib.get_close_matches(name, known, n=1)
    )
    return f"did you mean {' or '.join(near[:3])}?" if near else f"'{prog} --help' lists them"


def _value(option: Option, text: str, prefix: str) -> Any:
    hint = typing.get_args(option.plain)[0] if option.is_repeated else option.plain
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = [
        typing.get_args(one)[0] if typing.get_origin(one) is Annotated else one
        for one in (typing.get_args(hint) if union else (hint,))
    ]
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):  # None is off, never a text
        for value in _as(kind, text):
            return value
    names = [_named(kind) for kind in kinds if kind is not type(None)] + ["None"] * (type(None) in kinds)
    domain = domain_of(option.hint)
    several = "values with commas between them, each " * any(typing.get_origin(kind) is tuple for kind in kinds)
    rule = f"{several}{domain.rule}{', or None' * (type(None) in kinds)}" if domain is not None else " or ".join(names)
    raise ValueError(f"{prefix}{option.path}={shown(text)} must be {rule}; {fix(option.hint, option.default, text)}")


def _as(kind: Any, text: str) -> Iterator[Any]:
    """The value that `text` is of a type; nothing where it is none."""
    if typing.get_origin(kind) is Literal:
        yield from (choice for choice in typing.get_args(kind) if str(choice) == text)
    elif kind is type(None) or kind is bool:
        yield from (value for value in ((None,) if kind is type(None) else (True, False)) if str(value) == text)
    elif kind is int:
        yield from (int(digits) for digits in re.findall(r"^[+-]?[0-9]{1,400}$", text))
    elif kind is float:
        try:
            yield float(text)
        except ValueError:
            return
    elif typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        plain = typing.get_args(inner)[0] if typing.get_origin(inner) is Annotated else inner
        items = [next(_as(plain, item.strip()), None) for item in text.split(",")]
        yield from () if None in items else (tuple(items),)
    elif kind is str or (kind is Path and text.strip()):
        yield kind(text)


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "values with commas between them"
    return _WORDS.get(kind, str(kind))


def _replaced(value: Any, found: Mapping[str, Any]) -> Any:
    """`value` with leaves below it set, by their paths from it; the same object where there are none."""
    if not found:
        return value
    if "" in found:
        return found[""]
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in found.items():
        head, _, rest = path.partition(".")
        parts.setdefault(head, {})[rest] = leaf
    if isinstance(value, Mapping):
        return {key: _replaced(item, parts.get(key, {})) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_replaced(item, parts.get(str(index), {})) for index, item in enumerate(value))
    return dataclasses.replace(value, **{name: _replaced(getattr(value, name), below) for name, below in parts.items()})

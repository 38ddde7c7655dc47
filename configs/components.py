"""Components: the parts of an experiment that are found by name, one file each, and the configs that describe them.

A component's config is a frozen dataclass that builds the thing. It is registered under a name; the codec, the command line, `list`,
the docs and the contract suites go through the registry of its kind, so that a new file is all that a new component takes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from plait.configs.domains import check_leaves
from plait.configs.errors import is_bad_input
from plait.configs.outside import VARIABLE, import_outside

_deferred: contextvars.ContextVar[bool] = contextvars.ContextVar("plait_deferred", default=False)


class ConfigError(ValueError):
    """A config that cannot be used; the message begins with the dotted path."""


class Config:
    """Base of every config dataclass.

    Each leaf is in the domain that its annotation declares (`plait.configs.domains`), and values go together as `check` says. Messages
    begin with the field; whoever holds the config puts its own path before them. A config is checked where it is made, or, under
    `unchecked`, later and as a whole by `validate`.
    """

    path: ClassVar[str] = ""
    """Where it stands when nobody holds it: the beginning of its messages."""

    def __post_init__(self) -> None:
        if _deferred.get():
            with contextlib.suppress(ValueError):  # `validate` comes to it again, and knows where it stands
                self.complete()
        else:
            for step in (functools.partial(check_leaves, self), self.complete, self.check):
                at(self.path, step)

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON fields of an older run folder by the names that they have now."""
        return fields

    def complete(self) -> None:
        """Fills in what follows from other fields. Raises ValueError as `check` does."""

    def check(self) -> None:
        """Raises ValueError for the first value that cannot be used, as `FIELD=VALUE RULE; FIX`."""

    def open_keys(self) -> Mapping[str, tuple[str, ...]]:
        """Fields that are tables of components, with the keys that each may yet be given."""
        return {}


class Table(dict[str, Any]):
    """Configs by name; cannot be changed, so that configs stay hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _frozen(self, *_: Any, **__: Any) -> None:
        raise TypeError("a table of configs is final; build a new config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = clear = pop = popitem = setdefault = _frozen  # type: ignore[assignment]


C = TypeVar("C", bound=Config)


class Component(Config):
    """Base of the configs of one kind of component; `Registry.register` gives them their name."""

    kind_of_component: ClassVar[str]
    name: ClassVar[str]
    source: ClassVar[str]
    """Paper, as `Title (arXiv id)`, or where else it is from."""


def children(config: Any) -> Iterator[tuple[str, Any]]:
    """The configs in a config's fields, each with its path from here: `optimizer`, `mixers.gla`, `parts.0`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner: Iterator[tuple[str, Any]] = iter(())
        if isinstance(value, Config):
            inner = iter([("", value)])
        elif isinstance(value, Mapping):
            inner = ((f".{key}", item) for key, item in value.items())
        elif isinstance(value, tuple):
            inner = ((f".{index}", item) for index, item in enumerate(value))
        yield from ((field.name + name, item) for name, item in inner if isinstance(item, Config))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, made anew where it has a factory; `dataclasses.MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Configs made inside the block are not checked: their final values, and where they stand, are not known yet."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def validate(config: C, path: str = "") -> C:
    """`config`, checked with all that it holds. Raises ConfigError with the dotted path from `path` on."""
    at(path, check_leaves, config)
    at(path, config.complete)
    for name, child in children(config):
        validate(child, f"{path}.{name}" if path else name)
    at(path, config.check)
    return config


def at(path: str, check: Callable[..., Any], *args: Any) -> Any:
    """`check(*args)`, with `path` before the message of a ValueError that it raises."""
    try:
        return check(*args)
    except ValueError as error:
        if not is_bad_input(error, getattr(check, "__module__", "")):  # a component may come from another package
            raise
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def a(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


R = TypeVar("R", bound=Component)
registries: dict[str, Registry[Any]] = {}
"""By kind of component."""


def registry_of(base: type) -> Registry[Any] | None:
    """The registry of the components that are of a class: the base of a kind, or a registered one."""
    return next((found for found in registries.values() if any(issubclass(one, base) for one in found.all().values())), None)


class Registry(Generic[R]):
    """The components of one kind by name: the config classes that the modules of one package register."""

    def __init__(self, kind: str, package: str, base: type):
        """Args:
        kind: in words, as `channel mixer`.
        package: is searched with all folders in it, whatever they are.
        base: of the kind's configs.
        """
        self.kind, self.package, self.base = kind, package, base
        self._known: dict[str, type[R]] = {}
        self._searched: tuple[str, ...] = ()
        registries[kind] = self

    @property
    def tag(self) -> str:
        """The key under which JSON holds a component's name."""
        return f"{self.kind.replace(' ', '_')}_name"

    @property
    def plural(self) -> str:
        """What `launch.py list` calls them."""
        return f"{self.kind.replace(' ', '-')}s"

    def register(self, name: str, *, source: str, **facts: Any) -> Callable[[type[C]], type[C]]:
        """Class decorator: makes a config class known by `name`; `facts` become class attributes.

        Raises:
            ValueError: the name is taken, or the class is none of the kind's.
        """

        def add(config: Any) -> Any:
            if not issubclass(config, self.base):
                raise ValueError(
                    f"{config.__module__} registers {config.__qualname__} as the {self.kind} {name!r}; "
                    f"it must be {a(self.base.__name__)}; derive it from that"
                )
            known = self._known.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice, in {known.__module__} and {config.__module__}; rename one of them"
                )
            for key, value in {"kind_of_component": self.kind, "name": name, "source": source, "path": name, **facts}.items():
                setattr(config, key, value)
            self._known[name] = config
            return config

        return add

    def forget(self, name: str) -> None:
        """Takes a component out again."""
        self._known.pop(name, None)

    def all(self) -> dict[str, type[R]]:
        """Every component by name, sorted; imports each module of the package, and those outside it, once, and looks into folders once.

        Raises:
            ValueError: a module cannot be imported; the message begins with its file.
        """
        folders = tuple(importlib.import_module(self.package).__path__)
        if folders != self._searched:
            self._import(folders)
            self._searched = folders
            import_outside()
        return dict(sorted(self._known.items()))

    def _import(self, folders: tuple[str, ...]) -> None:
        for folder in map(Path, folders):
            found = (
                Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names if name.endswith(".py")
            )
            for file in sorted(found):
                parts = file.relative_to(folder).with_suffix("").parts
                if parts[-1] != "__init__" and all(part.isidentifier() for part in parts):
                    try:
                        importlib.import_module(".".join((self.package, *parts)))
                    except Exception as error:
                        what = f"{type(error).__name__}: {error}"
                        raise ConfigError(
                            f"{file} cannot be imported ({what}); correct it, or take it out of the folder"
                        ) from error

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())

    def __getitem__(self, name: str) -> type[R]:
        """The config class of a name. Raises ValueError naming the nearest ones."""
        known = self.all()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            names = ", ".join(known) if len(known) < 40 else f"{len(known)} others"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {names}"
            raise ValueError(
                f"{self.kind} {name!r} is not registered; {hint} (`launch.py list {self.plural}` shows all; one of your own is found "
                f"where {VARIABLE} names its file)"
            )
        return known[name]

    def holds(self, config: type) -> bool:
        """Whether a class is itself registered here: one that inherits from such a class is not."""
        return self._known.get(vars(config).get("name", "")) is config

    def __contains__(self, name: str) -> bool:
        return name in self.all()

"""The one dispatcher: an op has several implementations, each says what it does not support, and the choice is never silent."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("plait")
_ops: dict[str, "Op"] = {}
_chosen: dict[str, list[str]] = {}
_logged: set[tuple[str, str, str]] = set()


def _supports_all(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    run: Callable[..., Any]
    """Takes the resolved arguments of the op's public function."""

    unsupported: Callable[..., str | None] = _supports_all
    """Takes the same arguments; the reason why `run` cannot serve them, or None."""


class Op:
    """A named op and its implementations, in the order in which `auto` tries them."""

    def __init__(self, name: str, **implementations: Implementation):
        self.name = name
        self.implementations = implementations
        _ops[name] = self

    def __call__(self, implementation: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the op; `implementation` is a name, or `auto` for the first that supports the arguments."""
        name = self._auto(*args, **kwargs) if implementation == "auto" else self._named(implementation, *args, **kwargs)
        names = _chosen.setdefault(self.name, [])
        if name not in names:
            names.append(name)
        return self.implementations[name].run(*args, **kwargs)

    def _named(self, name: str, *args: Any, **kwargs: Any) -> str:
        if name not in self.implementations:
            known = ", ".join(("auto", *self.implementations))
            raise ValueError(f"{self.name}: implementation={name!r} is unknown; use one of {known}")
        reason = self.implementations[name].unsupported(*args, **kwargs)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: implementation={name!r} does not support this call: {reason}")
        return name

    def _auto(self, *args: Any, **kwargs: Any) -> str:
        declined: list[str] = []
        for name, candidate in self.implementations.items():
            reason = candidate.unsupported(*args, **kwargs)
            if reason is None:
                self._log_once(name, "; ".join(declined))
                return name
            declined.append(f"not {name} because {reason}")
        raise NotImplementedError(f"{self.name}: no implementation supports this call: {'; '.join(declined)}")

    def _log_once(self, name: str, declined: str) -> None:
        if (self.name, name, declined) not in _logged:
            _logged.add((self.name, name, declined))
            _log.info("%s: chose %s%s", self.name, name, f"; {declined}" if declined else "")


def chosen() -> dict[str, str]:
    """What each op has run with so far in this process, comma-separated in order of first use; goes into the run folder."""
    return {op: ", ".join(names) for op, names in _chosen.items()}


def registered() -> dict[str, tuple[str, ...]]:
    """The implementations of each op, in the order in which `auto` tries them."""
    return {name: tuple(op.implementations) for name, op in _ops.items()}

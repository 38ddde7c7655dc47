"""The one dispatcher: an op has several implementations, each says what it does not support, and the choice is never silent."""

import importlib
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax

from plait.kernels.call import Call
from plait.kernels.context import ContextRule, Parts
from plait.kernels.sharding import Shards, on_one_device, parts_of_sequence
from plait.kernels.target import Outdated, current, not_on

_log = logging.getLogger("plait")
_ops: dict[str, "Op"] = {}
_chosen: dict[str, list[str]] = {}
_logged: set[tuple[str, str, str]] = set()
_called: ContextVar[set["Op"] | None] = ContextVar("plait_called", default=None)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    run: Callable[[Any], Any]
    """Takes the call."""

    unsupported: Callable[[Any], str | None] = lambda call: None
    """Why `run` cannot serve a call, of which it may use options, shapes and dtypes only; or None."""

    per_device: bool = False
    """`run` knows one device only: under a mesh it gets the part of each."""

    platform: Literal["tpu", "gpu"] | None = None
    """The accelerator it is for; None for all backends."""

    @property
    def absent(self) -> bool:
        """Whether no call can be served here, whatever it is."""
        return self.platform is not None and not_on(self.platform) is not None


def kernel(platform: Literal["tpu", "gpu"], module: str, run: str, unsupported: str = "unsupported") -> Implementation:
    """The kernel `run` of a module, which is imported where `platform` is the target and nowhere else."""

    def reason(call: Call) -> str | None:
        return not_on(platform) or getattr(importlib.import_module(module), unsupported)(call)

    def call_kernel(call: Call) -> Any:
        return getattr(importlib.import_module(module), run)(call)

    return Implementation(call_kernel, reason, per_device=True, platform=platform)


class Op:
    """A named op and its implementations, in the order in which `auto` tries them."""

    def __init__(self, name: str, rule: ContextRule | None = None, /, **implementations: Implementation):
        """Args: `rule` serves calls whose sequence the mesh cuts; without one every device that needs it sees all of it."""
        self.name, self.rule, self.implementations = name, rule, implementations
        _ops[name] = self

    def __call__(self, implementation: str, call: Call) -> Any:
        """Runs the op; `implementation` is a name, or `auto` for the first that supports the call."""
        if (called := _called.get()) is not None:
            called.add(self)
            return self.implementations["reference"].run(call)
        if self.rule is not None and (parts := _parts(self.name, self.rule, call)) is not None:
            return _run_in_parts(self.name, self.rule, partial(self, implementation), parts, call)
        shards = Shards(call)
        name = self._auto(shards) if implementation == "auto" else self._named(implementation, shards)
        names = _chosen.setdefault(self.name, [])
        if name not in names:
            names.append(name)
        chosen = self.implementations[name]
        return shards.run(chosen.run) if chosen.per_device or shards.nested else chosen.run(call)

    def unsupported(self, name: str, call: Call) -> str | None:
        """Why the implementation `name` cannot serve a call, or None."""
        return self._reason(self.implementations[name], Shards(call))

    def served_by_kernel(self, call: Call) -> bool:
        """Whether a kernel of the accelerator at hand, or of the target, can serve a call."""
        return any(self.unsupported(name, call) is None for name, one in self.implementations.items() if one.platform)

    @staticmethod
    def _reason(candidate: Implementation, shards: Shards) -> str | None:
        return candidate.unsupported(shards.local() if candidate.per_device else shards.call)

    def _named(self, name: str, shards: Shards) -> str:
        if name not in self.implementations:
            known = ", ".join(("auto", *self.implementations))
            raise ValueError(f"{self.name}: implementation={name!r} is unknown; use one of {known}")
        reason = self._reason(self.implementations[name], shards)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: implementation={name!r} does not support this call: {reason}")
        return name

    def _auto(self, shards: Shards) -> str:
        declined: dict[str, str] = {}
        for name, candidate in self.implementations.items():
            reason = self._reason(candidate, shards)
            if reason is None:
                self._log_choice(name, declined)
                return name
            declined[name] = reason
        raise NotImplementedError(f"{self.name}: no implementation supports this call: {_words(declined)}")

    def _log_choice(self, name: str, declined: dict[str, str]) -> None:
        """Says once what was chosen and why no other of this backend, as a warning where only the installation is in the way; those of
        other backends are details."""
        here = {other: reason for other, reason in declined.items() if not self.implementations[other].absent}
        if here or current() is not None:
            outdated = any(isinstance(reason, Outdated) for reason in here.values())
            _log_once(self.name, f"chose {name}", _words(here), logging.WARNING if outdated else logging.INFO)
        else:
            _log_once("kernels", "plain JAX", f"there are none for the backend {jax.default_backend()} (--verbose says more)")
            _log_once(self.name, f"chose {name}", _words(declined), logging.DEBUG)


def _words(declined: dict[str, str]) -> str:
    return "; ".join(f"not {name} because {reason}" for name, reason in declined.items())


def in_parts(rule: ContextRule, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function` of a call, plain JAX, but run by `rule` where the mesh in use cuts its sequence."""

    def run(call: Call) -> Any:
        parts = _parts(function.__name__, rule, call)
        if parts is None:
            return function(call)
        return _run_in_parts(function.__module__.rpartition(".")[2], rule, function, parts, call)

    return run


def _parts(name: str, rule: ContextRule, call: Call) -> Parts | None:
    """The devices over which a call's sequence is cut; None where the mesh does not cut it, or the rule cannot."""
    parts = parts_of_sequence(call)
    reason = None if parts is None else rule.unsupported(parts.count, call)
    if reason is None:
        return parts
    _log_once(name, "chose whole sequences", f"not parts of them because {reason}")
    return None


def _run_in_parts(name: str, rule: ContextRule, op: Callable[[Any], Any], parts: Parts, call: Call) -> Any:
    with jax.named_scope(f"context_{name}"):
        return Shards(call, in_parts=True).run(partial(rule.run, on_one_device(op), parts))


def _log_once(op: str, what: str, declined: str, level: int = logging.INFO) -> None:
    if (op, what, declined) not in _logged:
        _logged.add((op, what, declined))
        _log.log(level, "%s: %s%s", op, what, f"; {declined}" if declined else "")


def chosen() -> dict[str, str]:
    """What each op has run with so far in this process, comma-separated in order of first use; goes into the run folder."""
    return {op: ", ".join(names) for op, names in _chosen.items()}


def forget_chosen() -> None:
    """Begins anew what `chosen` tells, as for another run in this process."""
    _chosen.clear()


def called_by(function: Callable[..., Any], *args: Any) -> list["Op"]:
    """The ops that `function(*args)` calls, by name; it is traced, not run."""
    found: set[Op] = set()
    token = _called.set(found)
    try:
        jax.eval_shape(function, *args)
    finally:
        _called.reset(token)
    return sorted(found, key=lambda op: op.name)


def registered(*, everywhere: bool = False) -> dict[str, tuple[str, ...]]:
    """The implementations of each op, in the order in which `auto` tries them; with `everywhere`, no accelerator's kernels."""
    return {
        name: tuple(key for key, implementation in op.implementations.items() if not (everywhere and implementation.platform))
        for name, op in _ops.items()
    }

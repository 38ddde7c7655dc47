"""Which accelerator the kernels are traced for: the one at hand, or another to compile for ahead of time."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax


@dataclass(frozen=True)
class Target:
    """A generation of accelerators; hashable, so that it can be a static argument."""

    platform: Literal["tpu", "gpu"]
    generation: str


TARGETS = {name: Target("tpu", name) for name in ("v4", "v5e", "v5p", "v6e", "tpu7x")} | {
    name: Target("gpu", name) for name in ("h100", "h200", "b200")
}
"""The targets by name."""

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What a device kind begins with; the longest that fits counts."""

_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("plait_target", default=None)


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Traces kernels for a target by name, whatever the default backend is: to compile ahead of time, or to interpret.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in TARGETS:
        raise ValueError(f"target={name!r} is unknown; use one of {', '.join(TARGETS)}")
    token = _target.set(TARGETS[name])
    try:
        yield
    finally:
        _target.reset(token)


def current() -> Target | None:
    """The target of kernels traced here: the one set by `target`, else the default device's; None on others, such as a CPU."""
    if _target.get() is not None:
        return _target.get()
    kind = jax.devices()[0].device_kind
    fitting = [known for known in _KINDS if kind.startswith(known)]
    return TARGETS[_KINDS[max(fitting, key=len)]] if fitting else None


def not_on(platform: Literal["tpu", "gpu"]) -> str | None:
    """Why a kernel for `platform` cannot be traced here, or None."""
    here = current()
    if here is None:
        return f"the backend is {jax.default_backend()}, no known {platform.upper()}"
    return None if here.platform == platform else f"the target is {here.generation}, not a {platform.upper()}"

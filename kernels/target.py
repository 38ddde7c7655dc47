"""Which accelerator the kernels are traced for: the one at hand, or another to compile for ahead of time."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

from plait.kernels.chips import CHIPS, Chip, chip_of


class Outdated(str):
    """Why a kernel cannot be traced here where another installation could: not a fact of the call, and worth a warning."""


_target: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("plait_target", default=None)


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Traces kernels for a target by name, whatever the default backend is: to compile ahead of time, or to interpret.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in CHIPS:
        raise ValueError(f"target={name!r} is unknown; use one of {', '.join(CHIPS)}")
    token = _target.set(CHIPS[name])
    try:
        yield
    finally:
        _target.reset(token)


def current() -> Chip | None:
    """The chip that kernels traced here are for: the one set by `target`, else the default device's; None on others, such as a CPU."""
    return _target.get() or chip_of(jax.devices()[0].device_kind)


def core_memory() -> int:
    """Bytes of the memory of a core of that chip; where it is unknown, of the least that a core has but for v4's."""
    here = current()
    return 64 << 20 if here is None else here.vector_memory


def on_cpu() -> bool:
    """Whether what is traced here is for a CPU."""
    return current() is None and jax.default_backend() == "cpu"


def not_on(platform: Literal["tpu", "gpu"]) -> str | None:
    """Why a kernel for `platform` cannot be traced here, or None."""
    here = current()
    if here is None:
        return f"the backend is {jax.default_backend()}, no known {platform.upper()}"
    return None if here.platform == platform else f"the target is {here.generation}, not a {platform.upper()}"

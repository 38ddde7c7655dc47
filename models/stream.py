"""What flows from block to block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax

if TYPE_CHECKING:
    from plait.models.build import BuildContext

Carry = Mapping[str, Any]
"""Arrays (or trees of them) by name, batch first."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream, and what some layers leave for others."""

    x: jax.Array
    """`[B, T, D]`."""
    carry: Carry = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CarryUse:
    """What a mixer does with one name of the carry."""

    name: str
    use: Literal["first", "write", "read", "model"]
    """`first`: the first layer that has the name writes it, the others read it; `write`: each layer writes it anew; `read`; `model`: the
    model leaves it before the first layer."""
    like: tuple[int, ...]
    """Its shape behind `[B, T]`, the same for all that share a name; of `model` behind `[B, 1, layers]`."""
    make: Callable[[BuildContext], Callable[[], jax.Array]] | None = None
    """Of `model`: makes the module, a call of which gives `[layers, *like]`."""


def check_carries(layers: list[tuple[str, tuple[CarryUse, ...]]]) -> None:
    """Raises ValueError unless what each layer reads was written by one mixer before it, and in the same shape.

    Args:
        layers: for each layer in order its pattern name and its uses.
    """
    writers: dict[str, tuple[str, CarryUse]] = {}
    for layer, uses in layers:
        written_here = [one.name for one in uses if one.use not in ("read", "model")]
        if twice := [name for name in written_here if written_here.count(name) > 1]:
            raise ValueError(f"mixers.{layer} writes the carry {twice[0]!r} in two of its parts; let one of them write it")
        for one in uses:
            writer, written = writers.get(one.name, (None, None))
            if written is None and one.use == "read":
                raise ValueError(
                    f"mixers.{layer} reads the carry {one.name!r}, which no layer before it writes; put a layer that does before it"
                )
            if written is None:
                writers[one.name] = (layer, one)
                continue
            if "write" in (one.use, written.use) and one.use != "read" and writer != layer:
                raise ValueError(
                    f"mixers.{layer} and mixers.{writer} both write the carry {one.name!r}; let one of them write and the other read"
                )
            if one.like != written.like:
                raise ValueError(
                    f"mixers.{layer} has the carry {one.name!r} in shape {one.like}, and mixers.{writer} writes {written.like}; "
                    "give both the same heads and head_dim"
                )

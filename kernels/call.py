"""One call of an op as a value: the public function makes and checks it once, and every implementation takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import jax

OPTION = {"static": True}
"""Metadata of a field that is known when a program is traced; hashable."""


def letters(axes: str) -> dict[str, str]:
    """Metadata of a field of arrays with these axes, such as "bthk"; those of an array with fewer are the first ones.

    A mesh may split b (rows of the batch), h (heads, or channels by head), s (tokens of an op to which each token is alone), and t
    (tokens in order) with n (spans of them) where the op has a rule for parts of sequences.
    """
    return {"letters": axes}


class Call:
    """Base of the calls, frozen dataclasses whose fields have one of the metadata above, and pytrees of their arrays."""

    results: ClassVar[tuple[str, ...]]
    """The letters of what an implementation returns."""

    def arrays(self) -> Iterator[tuple[str, str, Any]]:
        """Name, letters and value of the fields that hold arrays."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if "letters" in field.metadata and value is not None:
                yield field.name, field.metadata["letters"], value

    def leaves(self) -> Iterator[tuple[str, jax.Array]]:
        """Letters and array of every array."""
        for _, letters, value in self.arrays():
            for leaf in jax.tree.leaves(value):
                yield letters, leaf

    def replace(self, **fields: Any) -> Self:
        """The same call with other values of some fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

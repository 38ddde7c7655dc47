"""Runs an op under a mesh: every device gets its own rows of the batch, its own heads and, where the op can be cut there, tokens."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from plait.kernels.context import Parts


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of an op's arrays as letters, such as "bthk"; those of an array with fewer axes are the first ones.

    A mesh may split b (rows of the batch), h (heads, or channels by head), s (tokens of an op to which each token is alone), and t
    (tokens in order) with n (spans of them) where the op has a rule for parts of sequences.
    """

    arguments: tuple[str, ...]
    """Positional arguments, in order; the last one stands for all that follow."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Keyword arguments that are arrays, or hold some."""
    results: tuple[str, ...] = ()
    """What `run` returns, always."""
    statistics: str | None = None
    """One more result with `return_stats=True`."""


@dataclass(frozen=True)
class _Split:
    mesh: jax.sharding.Mesh
    over: Mapping[str, tuple[str, ...]]  # letter to mesh axes


_split: contextvars.ContextVar[_Split | None] = contextvars.ContextVar("plait_split", default=None)


@contextlib.contextmanager
def splitting(
    mesh: jax.sharding.Mesh,
    *,
    batch: tuple[str, ...],
    heads: tuple[str, ...],
    context: tuple[str, ...] = (),
    alone: tuple[str, ...] = (),
) -> Iterator[None]:
    """Splits the batches, heads and sequences of the ops called inside the block over these axes of `mesh`; an op to which each token
    is alone over `alone` too."""
    over = {"b": batch, "h": heads, "s": (*context, *heads, *alone), "t": context, "n": context}
    with _using(_Split(mesh, over)):
        yield


@contextlib.contextmanager
def _using(split: _Split | None) -> Iterator[None]:
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def parts_of_sequence(axes: Axes, args: tuple[Any, ...], options: Mapping[str, Any]) -> Parts | None:
    """The devices over which the mesh in use cuts a call's sequence; None where it does not, or not into two equal halves each."""
    split = _split.get()
    if split is None:
        return None
    count = math.prod(split.mesh.shape[axis] for axis in split.over["t"])
    lengths = {n for letters, x in _arrays(axes, args, options) for letter, n in zip(letters, x.shape) if letter == "t"}
    cut = count > 1 and len(lengths) == 1 and all(n % (2 * count) == 0 for n in lengths)
    return Parts(split.over["t"], count) if cut else None


def _names(axes: Axes, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[int | str, str]:
    """The letters of the arguments that are arrays, or hold some, by position or name."""
    names = axes.arguments + (axes.arguments[-1],) * (len(args) - len(axes.arguments))
    named: dict[int | str, str] = {i: letters for i, letters in enumerate(names) if i < len(args) and args[i] is not None}
    return named | {name: letters for name, letters in axes.options.items() if _has_arrays(options.get(name))}


def _arrays(axes: Axes, args: tuple[Any, ...], options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for at, letters in _names(axes, args, options).items():
        for leaf in jax.tree.leaves(args[at] if isinstance(at, int) else options[at]):
            yield letters, leaf


def inside(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh | jax.sharding.AbstractMesh:
    """`mesh` as the code around sees it: inside a `shard_map` over some of its axes, the mesh that knows these to be taken."""
    around = jax.sharding.get_abstract_mesh()
    return mesh if around.empty else around


class Shards:
    """One call of an op, divided over the mesh in use; without one, the call as it is."""

    def __init__(self, axes: Axes, args: tuple[Any, ...], options: dict[str, Any], *, in_parts: bool = False):
        """Args: `in_parts` also cuts the sequence (see `parts_of_sequence`)."""
        split = _split.get()
        self.args, self.options = args, options
        self.mesh = None if split is None or split.mesh.size == 1 else split.mesh
        # Inside a `shard_map` over some axes, what the compiler lays out over the others is best left simple: its partitioner gives
        # up on gathers there.
        self.nested = self.mesh is not None and inside(self.mesh) is not self.mesh
        if split is None or self.mesh is None:
            return
        self.axes = axes
        self.named = _names(axes, args, options)
        over = {letter: over for letter, over in split.over.items() if in_parts or letter not in "tn"}
        self.ways = {letter: math.prod(self.mesh.shape[axis] for axis in axes) for letter, axes in over.items()}
        divides = dict.fromkeys(self.ways, True)
        for letters, leaf in _arrays(axes, args, options):
            for letter, size in zip(letters, leaf.shape):
                if letter in self.ways and size > 1 and size % self.ways[letter]:
                    divides[letter] = False
        self.over = {letter: axes or None for letter, axes in over.items() if divides[letter]}

    def local(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as one device sees them; shapes and dtypes where they are divided."""
        if self.mesh is None:
            return self.args, self.options

        def shrink(at: Any, value: Any) -> Any:
            if at not in self.named:
                return value
            letters = self.named[at]

            def shard(x: Any) -> jax.ShapeDtypeStruct:
                ways = [self.ways[a] if a in self.over and n > 1 else 1 for a, n in zip(letters, x.shape)]
                return jax.ShapeDtypeStruct(tuple(n // w for n, w in zip(x.shape, ways)), x.dtype)

            return jax.tree.map(shard, value)

        return tuple(shrink(i, x) for i, x in enumerate(self.args)), {k: shrink(k, x) for k, x in self.options.items()}

    def run(self, function: Callable[..., Any]) -> Any:
        """`function(*args, **options)`, on each device for its part."""
        if self.mesh is None:
            return function(*self.args, **self.options)
        arrays = [self._get(at) for at in self.named]
        specs = [
            jax.tree.map(lambda x, letters=letters: self._spec(letters, x.shape), array)
            for letters, array in zip(self.named.values(), arrays)
        ]
        results = self.axes.results
        if self.axes.statistics and self.options.get("return_stats"):
            results += (self.axes.statistics,)

        def on_device(arrays: list[Any]) -> Any:
            part = dict(zip(self.named, arrays))
            args = tuple(part.get(i, x) for i, x in enumerate(self.args))
            with _using(None):
                return function(*args, **{name: part.get(name, x) for name, x in self.options.items()})

        out = tuple(self._spec(letters) for letters in results)
        return jax.shard_map(
            on_device, mesh=inside(self.mesh), in_specs=(specs,), out_specs=out if len(out) > 1 else out[0], check_vma=False
        )(arrays)

    def _get(self, at: int | str) -> Any:
        return self.args[at] if isinstance(at, int) else self.options[at]

    def _spec(self, letters: str, shape: tuple[int, ...] | None = None) -> P:
        sizes = (2,) * len(letters) if shape is None else shape
        named = [size > 1 or self.ways.get(letter) == 1 for letter, size in zip(letters, sizes)]
        return P(*(self.over.get(letter) if name else None for letter, name in zip(letters, named)))


def _has_arrays(value: Any) -> bool:
    return any(hasattr(leaf, "shape") and leaf.shape for leaf in jax.tree.leaves(value))

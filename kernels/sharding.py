"""Runs an op under a mesh: every device gets its own rows of the batch, its own heads and, where the op can be cut there, tokens."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from plait.kernels.call import Call
from plait.kernels.context import Exchange, Parts

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
"""With its devices, or without, to trace only."""


@dataclass(frozen=True)
class _Split:
    mesh: AnyMesh
    over: Mapping[str, tuple[str, ...]]  # letter to mesh axes
    exchange: Exchange = "gather"


_split: contextvars.ContextVar[_Split | None] = contextvars.ContextVar("plait_split", default=None)


@contextlib.contextmanager
def splitting(
    mesh: AnyMesh,
    *,
    batch: tuple[str, ...],
    heads: tuple[str, ...],
    context: tuple[str, ...] = (),
    alone: tuple[str, ...] = (),
    exchange: Exchange = "gather",
) -> Iterator[None]:
    """Splits the batches, heads and sequences of the ops called inside the block over these axes of `mesh`; an op to which each token
    is alone over `alone` too. `exchange` says how parts of sequences meet where an op can choose."""
    over = {"b": batch, "h": heads, "s": (*context, *heads, *alone), "t": context, "n": context}
    with _using(_Split(mesh, over, exchange)):
        yield


@contextlib.contextmanager
def _using(split: _Split | None) -> Iterator[None]:
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


def on_one_device(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`function`, whose ops no mesh divides, whenever it is traced: custom gradients are after the call is."""

    def run(call: Any) -> Any:
        with _using(None):
            return function(call)

    return run


def undivided() -> bool:
    """Whether no mesh of several devices is in use."""
    split = _split.get()
    return split is None or split.mesh.size == 1


def parts_of_sequence(call: Call) -> Parts | None:
    """The devices over which the mesh in use cuts a call's sequence; None where it does not, or not into two equal halves each."""
    split = _split.get()
    if split is None:
        return None
    count = math.prod(split.mesh.shape[axis] for axis in split.over["t"])
    lengths = {n for letters, x in call.leaves() for letter, n in zip(letters, x.shape) if letter == "t"}
    cut = count > 1 and len(lengths) == 1 and all(n % (2 * count) == 0 for n in lengths)
    return Parts(split.over["t"], count, split.exchange) if cut else None


def inside(mesh: AnyMesh) -> AnyMesh:
    """`mesh` as the code around sees it: inside a `shard_map` over some of its axes, the mesh that knows these to be taken."""
    around = jax.sharding.get_abstract_mesh()
    return mesh if around.empty else around


class Shards:
    """One call of an op, divided over the mesh in use; without one, the call as it is."""

    def __init__(self, call: Call, *, in_parts: bool = False):
        """Args: `in_parts` also cuts the sequence (see `parts_of_sequence`)."""
        split = _split.get()
        self.call = call
        self.mesh = None if split is None or split.mesh.size == 1 else split.mesh
        # Inside a `shard_map` over some axes, what the compiler lays out over the others is best left simple: its partitioner gives
        # up on gathers there.
        self.nested = self.mesh is not None and inside(self.mesh) is not self.mesh
        if split is None or self.mesh is None:
            return
        over = {letter: axes for letter, axes in split.over.items() if in_parts or letter not in "tn"}
        self.ways = {letter: math.prod(self.mesh.shape[axis] for axis in axes) for letter, axes in over.items()}
        sizes: dict[str, set[int]] = {}
        for letters, leaf in call.leaves():
            for letter, size in zip(letters, leaf.shape):
                sizes.setdefault(letter, set()).add(size)
        # one of something is for every device (the key head of several query heads), unless there is no more of it
        undivided = {
            letter
            for letter, ways in self.ways.items()
            if max(sizes.get(letter, {0})) == 1 or any(size > 1 and size % ways for size in sizes.get(letter, ()))
        }
        self.over = {letter: axes or None for letter, axes in over.items() if letter not in undivided}

    def local(self) -> Call:
        """The call as one device sees it; shapes and dtypes where it is divided."""
        if self.mesh is None:
            return self.call

        def shard(letters: str, x: Any) -> jax.ShapeDtypeStruct:
            ways = [self.ways[a] if a in self.over and n > 1 else 1 for a, n in zip(letters, x.shape)]
            shape = tuple(n // w for n, w in zip(x.shape, ways))
            return jax.ShapeDtypeStruct(shape + x.shape[len(shape) :], x.dtype)  # of axes without a letter all

        return self._map(shard)

    def run(self, function: Callable[[Any], Any]) -> Any:
        """`function(call)`, on each device for its part."""
        if self.mesh is None:
            return function(self.call)

        specs = self._map(lambda letters, x: self._spec(letters, x.shape))
        out = tuple(self._spec(letters) for letters in self.call.results)
        return jax.shard_map(
            on_one_device(function),
            mesh=inside(self.mesh),
            in_specs=(specs,),
            out_specs=out if len(out) > 1 else out[0],
            check_vma=False,
        )(self.call)

    def _map(self, function: Callable[[str, Any], Any]) -> Call:
        """The call with `function(letters, array)` in place of each array."""
        return self.call.replace(
            **{
                name: jax.tree.map(lambda x, letters=letters: function(letters, x), value)
                for name, letters, value in self.call.arrays()
            }
        )

    def _spec(self, letters: str, shape: tuple[int, ...] | None = None) -> P:
        sizes = (2,) * len(letters) if shape is None else shape
        named = [size > 1 or self.ways.get(letter) == 1 for letter, size in zip(letters, sizes)]
        return P(*(self.over.get(letter) if name else None for letter, name in zip(letters, named)))

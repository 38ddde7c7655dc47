"""Matrices taken whole from parameters that lie in parts on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from plait.configs.optimizer import Parameter, Parameters
from plait.train.mesh import names_of

Split = tuple[int, tuple[int, ...]]
OnMatrices = Callable[[jax.Array], jax.Array]
"""From matrices `[N, n, m]` to as many of the same shape, each by itself."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What parameters have in common whose matrices are done together."""

    shape: tuple[int, ...]
    split: Split | None
    cut: tuple[tuple[str, int], ...]
    """Mesh axes that divide the matrices, each with the axis of `[N, n, m]` that it divides, the innermost first."""
    copies: tuple[str, ...]
    """Mesh axes whose devices hold the same."""


def map_matrices(
    function: OnMatrices, arrays: Mapping[str, jax.Array], parameters: Parameters, *, blocks: bool
) -> dict[str, jax.Array]:
    """`function` of every matrix in `arrays`; the last two axes are the matrix, all before are batch axes.

    Matrices of one shape are done together. On a mesh each device gets an equal share of them whole, by one all-to-all for each
    mesh axis that divides them, and gives back the parts that it was sent; so no device ever holds all, and none does what another
    does too.

    Args:
        arrays: in the layout of their parameters.
        blocks: takes the independent matrices of a fused projection apart, as its `split` says.
    """
    kinds = {name: _kind(parameters[name], blocks) for name in arrays}

    def local(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        done: dict[str, jax.Array] = {}
        for kind in dict.fromkeys(kinds.values()):
            mine = {name: array for name, array in arrays.items() if kinds[name] == kind}
            stacks = [array.reshape(-1, *array.shape[-2:]) for array in mine.values()]
            ends = list(itertools.accumulate(stack.shape[0] for stack in stacks))
            found = _shared(functools.partial(_by_block, function, kind.split), jnp.concatenate(stacks), kind)
            for (name, array), part in zip(mine.items(), jnp.split(found, ends[:-1]), strict=True):
                done[name] = part.reshape(array.shape)
        return done

    layouts = {name: layout for name in arrays if (layout := parameters[name].layout) is not None}
    mesh = next((layout.mesh for layout in layouts.values()), None)
    if mesh is None or mesh.size == 1:
        return local(arrays)
    specs = {name: layout.spec for name, layout in layouts.items()}
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(dict(arrays))


def _kind(parameter: Parameter, blocks: bool) -> _Kind:
    split = parameter.split if blocks else None
    layout = parameter.layout
    if layout is None:
        return _Kind(parameter.shape[-2:], split, (), ())
    parts = [names_of(part) for part in layout.spec]
    wide = [name for name, size in layout.mesh.shape.items() if size > 1]
    cut = tuple((name, axis) for axis, part in zip((1, 2), parts[-2:]) for name in reversed(part) if name in wide)
    copies = tuple(name for name in wide if not any(name in part for part in parts))
    return _Kind(parameter.shape[-2:], split, cut, copies)


def _shared(function: OnMatrices, x: jax.Array, kind: _Kind) -> jax.Array:
    """`function` of the matrices of which `x` `[N, n / ways, m / ways]` is this device's part."""
    count = x.shape[0]
    x = _padded(x, math.prod(jax.lax.axis_size(name) for name, _ in kind.cut))
    for name, axis in kind.cut:
        x = jax.lax.all_to_all(x, name, 0, axis, tiled=True)
    x = _among_copies(function, x, kind.copies)
    for name, axis in reversed(kind.cut):
        x = jax.lax.all_to_all(x, name, axis, 0, tiled=True)
    return x[:count]


def _among_copies(function: OnMatrices, x: jax.Array, copies: tuple[str, ...]) -> jax.Array:
    """`function` of the matrices `x`, which the devices along `copies` hold too: each does its share, where there is one for each."""
    count = x.shape[0]
    ways = jax.lax.axis_size(copies[0]) if copies else 1
    if not copies or count < ways:
        return function(x) if len(copies) < 2 else _among_copies(function, x, copies[1:])
    x = _padded(x, ways)
    share = x.shape[0] // ways
    mine = jax.lax.dynamic_slice_in_dim(x, share * jax.lax.axis_index(copies[0]), share)
    return jax.lax.all_gather(_among_copies(function, mine, copies[1:]), copies[0], tiled=True)[:count]


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """`x` with zero matrices behind it."""
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0), (0, 0)))


def _by_block(function: OnMatrices, split: Split | None, x: jax.Array) -> jax.Array:
    """`function` of each block of the whole matrices `x` `[N, n, m]`; neighbours of one size are done together."""
    if split is None:
        return function(x)
    axis, sizes = split[0] % 3, split[1]
    runs = [(size, len(list(same))) for size, same in itertools.groupby(sizes)]
    ends = list(itertools.accumulate(size * number for size, number in runs))
    done = []
    for part, (size, number) in zip(jnp.split(x, ends[:-1], axis), runs, strict=True):
        cut = part.reshape(*part.shape[:axis], number, size, *part.shape[axis + 1 :])
        blocks = jnp.moveaxis(cut, axis, 0)
        each = function(blocks.reshape(-1, *blocks.shape[2:])).reshape(blocks.shape)
        done.append(jnp.moveaxis(each, 0, axis).reshape(part.shape))
    return jnp.concatenate(done, axis)

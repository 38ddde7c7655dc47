"""Whether the exchanges along each axis of a mesh are right, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.train.verify.agreement import first_line
from plait.train.verify.findings import Finding
from plait.train.verify.timing import timed

PART = "exchange along the mesh"
NUMBERS = 1 << 22
"""float32 numbers a device; a multiple of every axis."""


def collectives(mesh: Mesh, repeats: int) -> Iterator[Finding]:
    """A finding for each axis of more than one device and each exchange: its result, and bytes a device sends in a second at least."""
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    if not axes:
        yield Finding(part=PART, what="the mesh", status="skipped", detail="it has one device")
    for axis in axes:
        for name in EXCHANGES:
            try:
                yield _exchange(mesh, axis, name, repeats)
            except Exception as error:
                yield Finding(part=PART, what=name, by=axis, status="failed", detail=first_line(error))


def _all_to_all(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.all_to_all(x.reshape(jax.lax.axis_size(axis), -1), axis, 0, 0, tiled=False).reshape(-1)


def _ring(x: jax.Array, axis: str) -> jax.Array:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


EXCHANGES: dict[str, tuple[Callable[..., jax.Array], Callable[[np.ndarray], np.ndarray], Callable[[int], float]]] = {
    "sum (psum)": (
        jax.lax.psum,
        lambda x: np.broadcast_to(x.sum(0), x.shape),
        lambda n: 2 * (n - 1) / n,
    ),
    "gather (all_gather)": (
        partial(jax.lax.all_gather, tiled=True),
        lambda x: np.broadcast_to(x.reshape(-1), (len(x), x.size)),
        lambda n: n - 1,
    ),
    "sum and part (psum_scatter)": (
        partial(jax.lax.psum_scatter, tiled=True),
        lambda x: x.sum(0).reshape(len(x), -1),
        lambda n: (n - 1) / n,
    ),
    "each to each (all_to_all)": (
        _all_to_all,
        lambda x: x.reshape(len(x), len(x), -1).swapaxes(0, 1).reshape(len(x), -1),
        lambda n: (n - 1) / n,
    ),
    "to the next (ppermute)": (_ring, lambda x: np.roll(x, 1, 0), lambda n: 1.0),
}
"""By name: the exchange, what it gives of the numbers [devices of the axis, numbers of each], and the parts of these that are sent."""


def _exchange(mesh: Mesh, axis: str, name: str, repeats: int) -> Finding:
    run, expected, sent = EXCHANGES[name]
    size = mesh.shape[axis]
    count = NUMBERS // size * size
    where = NamedSharding(mesh, PartitionSpec(axis))
    values = lambda index: np.arange(size * count, dtype=np.float32)[index] % 251  # sums of these are exact
    x = jax.make_array_from_callback((size * count,), where, values)
    function = jax.jit(
        jax.shard_map(
            lambda x: run(x, axis), mesh=mesh, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(axis), check_vma=False
        )
    )
    got = function(x)
    want = expected(values(slice(None)).reshape(size, count)).reshape(-1)
    right = all(np.array_equal(shard.data, want[shard.index]) for shard in got.addressable_shards)
    call = lambda: jax.block_until_ready(function(x))
    taken: Any = timed({name: call}, repeats, least=0)[name]  # every host makes as many calls
    if isinstance(taken, Exception):
        raise taken
    rate = sent(size) * count * jnp.float32.dtype.itemsize / taken.middle
    detail = f"{rate / 1e9:.3g} GB/s sent by each of {size} devices" if right else "the result is wrong"
    return Finding(
        part=PART, what=name, by=axis, status="passed" if right else "failed", detail=detail, numbers={"bytes_per_second": rate}
    )

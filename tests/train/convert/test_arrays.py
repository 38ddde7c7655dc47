"""Arrays are laid on devices as their parts come, whatever the order, with little of them in the host's memory."""

import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from plait.models.hf.places import Place
from plait.train.convert.arrays import _SMALL, filled

LAYERS, EXPERTS = 6, 4


def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, -1), ("a", "b"))


@pytest.mark.parametrize("spec", [(), ("a",), (None, "a"), (None, None, "b"), ("a", None, None, "b"), (None, None, "a", "b")])
@pytest.mark.parametrize(("stacked", "width"), [(0, 16), (1, 16), (2, 16), (1, 32), (2, 32)])
def test_parts_come_in_any_order(stacked, width, spec):
    """Of an array that is gathered whole, and of a larger one."""
    whole = np.random.default_rng(0).normal(size=(LAYERS, EXPERTS, width, width)).astype(np.float32)
    assert (whole.nbytes > _SMALL) == (width > 16)
    indices = list(np.ndindex(whole.shape[:stacked]))
    order = np.random.default_rng(1).permutation(len(indices))
    parts = ((Place("w", indices[i]), whole[indices[i]]) for i in order)
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))
    (array,) = filled(parts, {"w": jax.ShapeDtypeStruct(whole.shape, np.float32)}, {"w": sharding}).values()
    np.testing.assert_array_equal(array, whole)
    assert array.sharding == sharding


@pytest.mark.parametrize("shape", [(), (3,)])
def test_numbers_are_arrays_too(shape):
    whole = np.arange(3, dtype=np.int32)[: shape[0]] if shape else np.int32(7)
    parts = [(Place("n", (i,)), whole[i]) for i in range(3)] if shape else [(Place("n"), np.asarray(whole))]
    like, sharding = jax.ShapeDtypeStruct(shape, np.int32), NamedSharding(mesh(), PartitionSpec())
    np.testing.assert_array_equal(filled(parts, {"n": like}, {"n": sharding})["n"], whole)


def test_one_layer_of_an_array_is_in_the_hosts_memory_at_a_time():
    layers, width = 64, 256
    entry = 4 * width * width
    parts = ((Place("w", (i,)), np.full((width, width), i, np.float32)) for i in range(layers))
    like, sharding = jax.ShapeDtypeStruct((layers, width, width), np.float32), NamedSharding(mesh(), PartitionSpec())
    tracemalloc.start()
    try:
        array = filled(parts, {"w": like}, {"w": sharding})["w"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.asarray(array)[:, 0, 0], np.arange(layers))
    assert peak < 16 * entry < layers * entry

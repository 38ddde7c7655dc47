"""Layers with a memory that learns, under a mesh: each device works off its own rows, and its own heads where the memories are apart."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait.kernels import dispatch
from plait.kernels.sharding import splitting
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS
from plait.tests.models.common import layout, quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, BATCH = 64, 12, 8
MEMORIES = {"memora": ("online_memory", 2, 2), "titans_mag": ("online_memory", 2, 2), "titans_mac": ("memory_context", 4, 1)}
"""The op, its heads, and the devices that these are divided over."""


@pytest.mark.parametrize("name", usually(MEMORIES, "memora"))
def test_each_device_has_its_rows(name, monkeypatch):
    op, heads, ways = MEMORIES[name]
    layer = MIXERS[name].example().build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    at, x = layout(*[(5, 6)] * BATCH, length=LENGTH), jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))

    def run(params, x):
        loss = lambda params, x: jnp.square(nnx.merge(graph, params, rest)(x, at=at, carry={}).y).sum()
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    alone = quick_jit(run)(params, x)
    implementation, shapes = dispatch._ops[op].implementations["chunked"], []

    def seen(call):
        shapes.append(call.q.shape)
        return implementation.run(call)

    monkeypatch.setitem(dispatch._ops[op].implementations, "chunked", dataclasses.replace(implementation, run=seen))
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with splitting(mesh, batch=("data", "fsdp"), heads=("tensor",)):
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        divided = quick_jit(partial(run))(params, rows)
    assert {shape[:1] + shape[2:3] for shape in shapes} == {(BATCH // 4, heads // ways)}
    for (path, got), want in zip(jax.tree.leaves_with_path(divided), jax.tree.leaves(alone), strict=True):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))

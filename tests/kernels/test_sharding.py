"""Kernels that know one device only, run under a mesh: the same values and gradients, each device on its part."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from plait.kernels import Mask, Tokens, attention, decay, dispatch, topk_blocks, whole_blocks
from plait.kernels.attention.call import AttentionCall
from plait.kernels.masks import SelectedBlocks
from plait.kernels.sharding import Shards, splitting
from plait.kernels.topk_blocks import reference
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close

pytestmark = pytest.mark.newest
LENGTH = 40


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has the chunked forms run as kernels do; collects the shapes of q that they are given."""
    shapes: list[tuple[int, ...]] = []

    for name in ("attention", "decay"):
        op = dispatch._ops[name]
        plain = op.implementations["chunked"].run

        def run(call: Any, plain: Any = plain) -> Any:
            shapes.append(call.q.shape)
            return plain(call)

        monkeypatch.setitem(op.implementations, "chunked", dispatch.Implementation(run, per_device=True))
    return shapes


def _attention_inputs(batch: int, num_kv_heads: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    heads = {"q": 4, "k": num_kv_heads, "v": num_kv_heads}
    inputs = {name: jnp.asarray(rng.standard_normal((batch, LENGTH, n, 8)), jnp.float32) for name, n in heads.items()}
    return inputs | {"sinks": jnp.asarray(rng.standard_normal(4), jnp.float32)}


def _attend(inputs: dict[str, jax.Array]) -> Any:
    def outputs(inputs: dict[str, jax.Array]) -> Any:
        ids = jnp.asarray(np.arange(LENGTH)[None].repeat(inputs["q"].shape[0], 0) // 15 + 1)
        o, stats = attention(**inputs, mask=Mask(), at=Tokens(None, ids), return_stats=True, implementation="chunked")
        return {"o": o, "entropy": stats.entropy}

    return cases.with_gradients(outputs, inputs)


def _recur(inputs: dict[str, jax.Array]) -> Any:
    def outputs(inputs: dict[str, jax.Array]) -> Any:
        return dict(zip(("o", "state", "stats"), decay(**inputs, return_stats=True, implementation="chunked")))

    return cases.with_gradients(outputs, inputs)


def _assert_same(function: Any, inputs: dict[str, jax.Array], mesh: Mesh) -> None:
    alone = cases.quick_jit(function)(inputs)

    def rows(x: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp") if x.ndim > 1 and x.shape[0] % 4 == 0 else None))

    with splitting(mesh, batch=("data", "fsdp"), heads=("tensor",)):  # a new partial: what is traced depends on the mesh
        split = cases.quick_jit(partial(function))(jax.tree.map(lambda x: jax.device_put(x, rows(x)), inputs))
    for (path, got), want in zip(jax.tree.leaves_with_path(split), jax.tree.leaves(alone), strict=True):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "local"),
    [(4, 2, (1, LENGTH, 2, 8)), (8, 1, (2, LENGTH, 2, 8)), (3, 4, (3, LENGTH, 2, 8))],
    ids=["grouped", "one-key-head", "rows-do-not-divide"],
)
def test_attention_is_split_by_rows_and_heads(mesh, seen, batch: int, num_kv_heads: int, local: tuple[int, ...]):
    _assert_same(_attend, _attention_inputs(batch, num_kv_heads), mesh)
    assert local in seen


def test_recurrence_is_split_by_rows_and_heads(mesh, seen):
    rng = np.random.default_rng(0)
    shapes = {"q": (4, LENGTH, 2, 8), "k": (4, LENGTH, 2, 8), "v": (4, LENGTH, 4, 4)}
    inputs = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    inputs |= {"g": -jnp.asarray(rng.random((4, LENGTH, 4)), jnp.float32), "initial_state": jnp.ones((4, 4, 8, 4))}
    _assert_same(_recur, inputs, mesh)
    assert (1, LENGTH, 1, 8) in seen


def test_unsupported_sees_the_part_of_a_device(mesh):
    sizes = []

    def reason(call: Any) -> str | None:
        sizes.append(call.q.shape)
        return "never"

    op = dispatch.Op("demo", kernel=dispatch.Implementation(lambda call: None, reason, per_device=True))
    dispatch._ops.pop("demo")
    q = jnp.zeros((8, LENGTH, 4, 8))
    call = AttentionCall.of("attention", q=q, k=q, v=q, mask=Mask())
    with splitting(mesh, batch=("data", "fsdp"), heads=("tensor",)):
        assert op.unsupported("kernel", call) == "never"
    assert op.unsupported("kernel", call) == "never"
    assert sizes == [(2, LENGTH, 2, 8), q.shape]


def test_one_device_sees_axes_that_nothing_divides(mesh: Mesh):
    q, k = jnp.zeros((4, LENGTH, 4, 8)), jnp.zeros((4, LENGTH, 1, 8))
    selected = SelectedBlocks(indices=jnp.zeros((4, LENGTH, 1, 3), jnp.int32), block_size=1, num_blocks=LENGTH)
    call = AttentionCall.of("attention", q=q, k=k, value_dim=4, mask=Mask(), selected=selected)
    with splitting(mesh, batch=("data",), heads=("tensor",)):
        local = Shards(call).local()
    assert (local.q.shape, local.k.shape) == ((2, LENGTH, 2, 8), (2, LENGTH, 1, 8))
    assert local.selected.indices.shape == (2, LENGTH, 1, 3)


def test_a_device_chooses_for_its_own_queries(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    """So that as many are taken at a time as fit one device, not all of them."""
    plain, shapes = reference.topk_blocks, []
    q = jnp.asarray(np.random.default_rng(0).standard_normal((4, LENGTH, 4, 8)), jnp.float32)

    def run(call: Any) -> Any:
        shapes.append(call.q.shape)
        return plain(call)

    def choose(q: jax.Array) -> jax.Array:
        blocks, options = whole_blocks(Tokens().placed(*q.shape[:2]), 8), {"block_size": 8, "num_blocks": LENGTH // 8}
        chosen = topk_blocks(q, blocks.mean(q), blocks_at=blocks.at, top_k=3, implementation="chunked", **options)
        return chosen.indices

    monkeypatch.setattr(reference, "topk_blocks", run)
    alone = cases.quick_jit(choose)(q)
    with splitting(mesh, batch=("data", "fsdp"), heads=("tensor",)):
        together = cases.quick_jit(partial(choose))(q)
    assert shapes == [q.shape, (1, LENGTH, 2, 8)]
    np.testing.assert_array_equal(together, alone)

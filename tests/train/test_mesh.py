"""Meshes of eight devices: the same numbers as one device, the layouts that the rules say, and clear refusals."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from plait.configs.experiment import MeshConfig
from plait.models import axes
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import hybrid, random_batch, routed, setup_of, tree_arrays
from plait.train.evaluate import place
from plait.train.mesh import RULES, batch_sharding, make_mesh, sharding, spec
from plait.train.step import make_step

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "tensor 2": {"data": 1, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# Adam divides a gradient by its own size: where that is all rounding, so is the update. A large epsilon keeps such ones small.
SIZES = {"data.batch_size": 8, "model.z_loss": 1e-3, "optimizer.ema": 0.9, "optimizer.eps": 1e-2}
BATCHES = [random_batch(8, seed=seed) for seed in (0, 1)]


def two_steps(config):
    """The state and metrics of two steps on the config's mesh, compiled with the shardings of a run."""
    setup = setup_of(config, devices=8)
    state = setup.fresh()
    step = make_step(setup.blueprint, setup.tx, setup.mesh, None)
    step = quick_jit(step, out_shardings=(setup.shardings, None))
    rows = batch_sharding(setup.mesh, 8, config.data.seq_len, config.optimizer.accumulate)
    seen = []
    for batch in BATCHES:
        state, metrics = step(state, place(batch, rows))
        seen.append(metrics)
    return setup, state, seen


@pytest.fixture(scope="module")
def alone(compile_cache):
    """Two steps on one device."""
    return two_steps(routed(SIZES))


def assert_same_training(found, expected):
    (_, state, metrics), (_, reference, wanted) = found, expected
    for got, want in zip(metrics, wanted, strict=True):
        for name in ("loss/train", "loss/z", "loss/balance", "grad/norm"):
            assert_close(got[name], want[name], err_msg=name)
    for one, other in ((state.optimizer, reference.optimizer), (state.params, reference.params), (state.ema, reference.ema)):
        got, want = tree_arrays(one), tree_arrays(other)
        assert got.keys() == want.keys()
        for path in got:
            assert_close(got[path], want[path], err_msg=path)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_mesh_trains_as_one_device(mesh, alone):
    assert_same_training(two_steps(routed({**SIZES, "mesh": MeshConfig(**mesh)})), alone)


@pytest.mark.slow
def test_recurrent_layers_on_all_axes_train_as_one_device():
    mesh = MeshConfig(**MESHES["data 2 x fsdp 2 x tensor 2"])
    assert_same_training(two_steps(hybrid({**SIZES, "mesh": mesh})), two_steps(hybrid(SIZES)))


def test_accumulation_on_a_mesh(alone):
    mesh = {"mesh": MeshConfig(data=2, fsdp=2), "optimizer.accumulate": 2}
    found = two_steps(routed({**SIZES, **mesh}))
    for got, want in zip(found[2], alone[2], strict=True):
        assert_close(got["loss/train"], want["loss/train"])
        assert_close(got["loss/z"], want["loss/z"])


LAYOUT = {
    "embedding": P("tensor", "fsdp"),
    "head.kernel": P("fsdp", "tensor"),
    "q.kernel": P("fsdp", "tensor"),
    "o.kernel": P("tensor", "fsdp"),
    "channel_mixer.up.kernel": P("fsdp", "tensor"),
    "channel_mixer.down.kernel": P("tensor", "fsdp"),
    "routed_router.kernel": P("fsdp", None),
    "norm.scale": P(None),
}


def test_parameters_moments_and_averages_lie_as_the_rules_say():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    setup = setup_of(routed({**SIZES, "mesh": mesh, "model.sigma_reparam": "one"}), devices=8)
    shardings = setup.shardings
    for ending, partition in LAYOUT.items():
        names = [name for name in shardings.params if name.endswith(ending)]
        assert names, ending
        assert {shardings.params[name].spec for name in names} == {partition}, ending
    like = setup.like()
    assert {name: a.sharding for name, a in like.ema.items()} == shardings.params
    moments = jax.tree_util.tree_leaves_with_path(like.optimizer)
    for path, leaf in moments:
        name = next((part.key for part in path if getattr(part, "key", None) in shardings.params), None)
        expected = P() if name is None else shardings.params[name].spec
        assert leaf.sharding.spec == expected, jax.tree_util.keystr(path)
    assert sum(any(getattr(part, "key", None) in shardings.params for part in path) for path, _ in moments) == 2 * len(
        shardings.params
    )
    for name, layout in shardings.buffers.items():  # a singular vector lies as the axis of the kernel it spans
        kernel = shardings.params[name.rpartition(".")[0] + ".kernel"].spec
        assert layout.spec == P(kernel[0] if name.endswith(".v") else kernel[1]), name


def test_fresh_state_is_the_same_on_any_mesh_and_laid_out_at_once():
    whole, parts = setup_of(routed(SIZES)), setup_of(routed({**SIZES, "mesh": MeshConfig(fsdp=4, tensor=2)}), devices=8)
    a, b = whole.fresh(), parts.fresh()
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name], err_msg=name)
    assert jax.tree.map(lambda x: x.sharding, b) == parts.shardings
    kernel = next(p for name, p in b.params.items() if name.endswith("q.kernel"))
    assert kernel.addressable_shards[0].data.shape == (16 // 4, 16 // 2)


def test_every_logical_axis_has_a_rule_and_a_mesh_axis_is_used_once():
    assert set(RULES) == set(axes.NAMES)
    assert spec((axes.HEADS, axes.MLP)) == P("tensor", None)
    assert spec((axes.BATCH, axes.LENGTH, axes.EMBED)) == P(("data", "fsdp"), "context", None)
    assert spec((None, axes.HEADS)) == P(None, "tensor")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"context": 4}, (2, 1, 4, 1)),
        ({"data": 2}, (2, 1, 1, 1)),
        ({"data": 1, "fsdp": 3}, (1, 3, 1, 1)),
    ],
    ids=str,
)
def test_mesh_shape(config, shape):
    assert make_mesh(MeshConfig(**config), jax.devices()).devices.shape == shape


@pytest.mark.parametrize("config", [{"fsdp": 3}, {"fsdp": 16}, {"data": 3, "tensor": 4}, {"data": 16}], ids=str)
def test_axes_that_do_not_make_the_devices_are_refused(config):
    with pytest.raises(ValueError) as error:
        make_mesh(MeshConfig(**config), jax.devices())
    message = str(error.value)
    for name in ("data", "fsdp", "context", "tensor"):
        assert f"mesh.{name}={getattr(MeshConfig(**config), name)}" in message
    assert "must multiply to the 8 devices; leave mesh.data=None to fill them" in message


def test_parameter_that_a_mesh_does_not_divide_is_named():
    config = routed({**SIZES, "mesh": MeshConfig(data=1, fsdp=5)})
    with pytest.raises(
        ValueError, match=r"parameter \S+ has embed=16, which mesh fsdp=5 must divide; change the mesh or the model"
    ):
        setup_of(config, devices=5)


def test_heads_that_tensor_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=1, tensor=8), jax.devices())
    with pytest.raises(ValueError, match="parameter k has kv_heads=12, which mesh tensor=8 must divide"):
        sharding(mesh, (axes.EMBED, axes.KV_HEADS), (16, 12), "parameter k")


@pytest.mark.parametrize(("rows", "parts"), [(6, 1), (8, 2), (4, 1)])
def test_batch_that_the_data_axes_do_not_divide_is_refused_with_one_that_they_do(rows, parts):
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    with pytest.raises(ValueError) as error:
        batch_sharding(mesh, rows, 64, parts)
    message = str(error.value)
    assert f"data.batch_size={rows} / optimizer.accumulate={parts}" in message and "data=1 x fsdp=8" in message
    suggested = int(message.partition("use a batch of ")[2].partition(" ")[0])
    batch_sharding(mesh, suggested, 64, parts)

"""Meshes of eight devices: the same numbers as one device, the layouts that the rules say, and clear refusals."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from plait.configs.mesh import MeshConfig
from plait.models import axes
from plait.tests.models.common import quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, different_arrays, hybrid, program_of, random_batch, routed, tiny, tree_arrays
from plait.train.checkpoint import Checkpoints
from plait.train.mesh import AXES, RULES, batch_sharding, make_mesh, sharding, spec, spread
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


# Norms blow up vectors as small as those of fresh small models: one rounding of the parameters then moves gradients by 2e-4 on one
# device, and no two orders of summation could be compared. So the residual stream begins as large as what layers add to it, and the
# norms over heads have an epsilon about as large as their heads.


def _smooth(mixer):
    if hasattr(mixer, "mixer"):
        return dataclasses.replace(mixer, mixer=_smooth(mixer.mixer))
    return dataclasses.replace(mixer, norm_eps=1e-2) if hasattr(mixer, "norm_eps") else mixer


def _of_unit_size(state):
    return dataclasses.replace(state, params={**state.params, "embedding": 50 * state.params["embedding"]})


def two_steps(config):
    """The state and metrics of two steps on the config's mesh, compiled with the shardings of a run."""
    config = changed(config, {"model.mixers": {name: _smooth(mixer) for name, mixer in config.model.mixers.items()}})
    setup = program_of(config, devices=8)
    state = _of_unit_size(setup.fresh())
    step = make_step(setup.blueprint, setup.tx, setup.mesh, None)
    step = quick_jit(step, out_shardings=(setup.shardings, None))
    rows = batch_sharding(setup.mesh, 8, config.data.seq_len, config.optimizer.accumulate)
    seen = []
    for batch in BATCHES:
        state, metrics = step(state, jax.device_put(batch, rows), **setup.controls)
        seen.append(metrics)
    return setup, state, seen


@pytest.fixture(scope="module")
def alone(compile_cache):
    """Two steps on one device."""
    return two_steps(routed(SIZES))


def assert_same_training(found, expected):
    (_, state, metrics), (_, reference, wanted) = found, expected
    for got, want in zip(metrics, wanted, strict=True):
        for name in (name for name in want if name.startswith(("loss/", "grad/"))):
            assert_close(got[name], want[name], err_msg=name)
    for one, other in ((state.optimizer, reference.optimizer), (state.params, reference.params), (state.ema, reference.ema)):
        got, want = tree_arrays(one), tree_arrays(other)
        assert got.keys() == want.keys()
        for path in got:
            root = np.sqrt if ".nu[" in path else np.asarray  # a square has twice the relative error of its gradient
            assert_close(root(got[path]), root(want[path]), err_msg=path)


@pytest.mark.parametrize("mesh", usually(MESHES.values(), MESHES["fsdp 8"], MESHES["data 2 x fsdp 2 x tensor 2"]), ids=MESHES)
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
    setup = program_of(routed({**SIZES, "mesh": mesh, "model.sigma_reparam": "one"}), devices=8)
    shardings = setup.shardings
    for ending, partition in LAYOUT.items():
        names = [name for name in shardings.params if name.endswith(ending)]
        assert names, ending
        assert {shardings.params[name].spec for name in names} == {partition}, ending
    like = setup.like
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


def test_zero_divides_moments_and_average_over_the_axes_that_copy_parameters():
    mesh = MeshConfig(data=2, fsdp=2, context=2, zero=True)
    setup = program_of(routed({**SIZES, "model.num_layers": 2, "mesh": mesh}), devices=8)
    like = setup.like
    whole = {name: p.sharding.shard_shape(p.shape) for name, p in like.params.items()}
    for name, average in like.ema.items():
        ways = np.prod(whole[name]) / np.prod(average.sharding.shard_shape(average.shape))
        assert ways == 4, name  # data x context; fsdp divides the parameter itself
    moments = [a for a in jax.tree.leaves(like.optimizer) if a.ndim]
    assert {a.sharding.spec for a in moments} == {a.sharding.spec for a in like.ema.values()}
    assert like.ema["embedding"].sharding.spec == P(("tensor", "data", "context"), "fsdp")


def test_zero_leaves_alone_what_nothing_divides():
    mesh = make_mesh(MeshConfig(data=4, context=2), jax.devices())
    whole = NamedSharding(mesh, P(None, None))
    assert spread(whole, (None, None), (3, 5)).spec == P(None, None)
    assert spread(whole, (axes.LAYERS, axes.MLP), (8, 4)).spec == P("context", "data")
    assert spread(NamedSharding(mesh, P("context")), (axes.MLP,), (16,)).spec == P(("context", "data"))


OFFLOAD = {**SIZES, "optimizer.accumulate": 2, "mesh": MeshConfig(data=2, fsdp=2, offload="optimizer", zero=True)}


def test_moments_wait_in_host_memory_and_change_nothing(compile_cache):
    config = tiny(OFFLOAD)
    found = two_steps(config)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(found[1].optimizer) if a.ndim} == {"pinned_host"}
    assert {a.sharding.memory_kind for a in jax.tree.leaves(found[1].params)} == {"device"}
    assert_same_training(found, two_steps(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))))


def test_moments_in_host_memory_are_saved_and_restored(tmp_path, compile_cache):
    _, state, _ = two_steps(tiny(OFFLOAD))
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(2, state, {}, loss=None)
    checkpoints.wait()
    for mesh in (OFFLOAD["mesh"], MeshConfig(fsdp=4, tensor=2), MeshConfig(data=1, tensor=2, offload="optimizer")):
        like = program_of(tiny({**OFFLOAD, "mesh": mesh}), devices=8).like
        _, again, _ = checkpoints.restore(like)
        assert different_arrays(again, state) == []
        assert jax.tree.map(lambda a: a.sharding, again) == jax.tree.map(lambda a: a.sharding, like)
    checkpoints.close()


def test_fresh_state_is_the_same_on_any_mesh_and_laid_out_at_once():
    whole, parts = program_of(routed(SIZES)), program_of(routed({**SIZES, "mesh": MeshConfig(fsdp=4, tensor=2)}), devices=8)
    a, b = whole.fresh(), parts.fresh()
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name], err_msg=name)
    assert jax.tree.map(lambda x: x.sharding, b) == parts.shardings
    kernel = next(p for name, p in b.params.items() if name.endswith("q.kernel"))
    assert kernel.addressable_shards[0].data.shape == (16 // 4, 16 // 2)


TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="described TPUs need the extra aot")


def described(name: str, slices: int, monkeypatch: pytest.MonkeyPatch) -> list:
    """The devices of TPU slices that are not at hand."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def neighbours(line, sides) -> bool:
    """Whether devices along a mesh axis are one link of the torus apart each."""
    coords = np.array([device.coords for device in line])
    apart = np.abs(np.diff(coords, axis=0))
    return (np.minimum(apart, np.array(sides)[None] - apart).sum(1) <= 1).all()


@TPU
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v4:2x2x1", "v6e:4x4", "tpu7x:2x2x1"])
def test_inner_axes_join_neighbouring_chips(name, monkeypatch):
    devices = described(name, 1, monkeypatch)
    mesh = make_mesh(MeshConfig(context=2, tensor=4 if name.endswith("4x4") else 2), devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    sides = np.max([d.coords for d in devices], axis=0) + 1
    for axis in ("context", "tensor"):
        lines = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
        assert all(neighbours(line, sides) for line in lines), axis


@TPU
@pytest.mark.parametrize(
    ("config", "outermost"),
    [
        ({"fsdp": 8}, "data"),
        ({"pipeline": 2, "data": 1, "fsdp": 8}, "pipeline"),
        ({"pipeline": 2, "data": 2, "fsdp": 4}, "pipeline"),
    ],
    ids=str,
)
def test_outermost_axis_spans_the_slices(config, outermost, monkeypatch):
    mesh = make_mesh(MeshConfig(**config), described("v5e:2x4", 2, monkeypatch))
    by_axis = np.moveaxis(mesh.devices, AXES.index(outermost), 0)
    for index in range(2):
        assert {device.slice_index for device in by_axis[index].flat} == {index}


@TPU
@pytest.mark.parametrize("config", [{"fsdp": 16}, {"data": 1, "fsdp": 8, "tensor": 2}], ids=str)
def test_slices_that_the_outermost_axes_do_not_span_are_refused(config, monkeypatch):
    with pytest.raises(ValueError) as error:
        make_mesh(MeshConfig(**config), described("v5e:2x4", 2, monkeypatch))
    message = str(error.value)
    assert "mesh.pipeline=1 x mesh.data=1 must be a multiple of the 2 slices of the 16 devices" in message
    assert "use mesh.data=2 and at most 8 devices on the other axes (now 16)" in message


def test_every_logical_axis_has_a_rule_and_a_mesh_axis_is_used_once():
    assert set(RULES) == set(axes.NAMES)
    assert spec((axes.HEADS, axes.MLP)) == P("tensor", None)
    assert spec((axes.BATCH, axes.LENGTH, axes.EMBED)) == P(("data", "fsdp", "expert"), "context", None)
    assert spec((None, axes.HEADS)) == P(None, "tensor")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (1, 8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (1, 2, 4, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (1, 2, 2, 1, 1, 2)),
        ({"pipeline": 2, "context": 4}, (2, 1, 1, 1, 4, 1)),
        ({"expert": 4}, (1, 2, 1, 4, 1, 1)),
        ({"data": 2}, (1, 2, 1, 1, 1, 1)),
        ({"data": 1, "fsdp": 3}, (1, 1, 3, 1, 1, 1)),
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
    for name in AXES:
        assert f"mesh.{name}={getattr(MeshConfig(**config), name)}" in message
    assert "must multiply to the 8 devices; leave mesh.data=None to fill them" in message


def test_parameter_that_a_mesh_does_not_divide_is_named():
    config = routed({**SIZES, "data.batch_size": 5, "mesh": MeshConfig(data=1, fsdp=5)})
    with pytest.raises(
        ValueError, match=r"parameter \S+ has embed=16, which mesh fsdp=5 must divide; change the mesh or the model"
    ):
        program_of(config, devices=5)


def test_an_exchange_over_one_device_is_refused():
    with pytest.raises(
        ValueError, match=r"mesh\.context_exchange=all_to_all .* context=1 cuts none; use gather, or context=2 or more"
    ):
        MeshConfig(context_exchange="all_to_all")


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

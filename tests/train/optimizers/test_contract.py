"""What every registered optimizer keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.codec import decode, encode
from plait.configs.components import ConfigError
from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import OPTIMIZERS, optimizer
from plait.tests.models.common import quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close
from plait.tests.train.common import different_arrays, hybrid, program_of, random_batch, tiny, tree_arrays
from plait.train.checkpoint import Checkpoints
from plait.train.optimizers import make_optimizer
from plait.train.optimizers.schedule import make_schedule
from plait.train.pods.plan.memory import state_bytes
from plait.train.step import make_step

OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS.all())
STEADY = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None}
MESHES = {
    "fsdp 4": {"data": 1, "fsdp": 4},
    "tensor 2": {"data": 1, "tensor": 2},
    "fsdp 4 x tensor 2": {"data": 1, "fsdp": 4, "tensor": 2},
    "pipeline 2 x data 2 x fsdp 2, ZeRO": {"pipeline": 2, "data": 2, "fsdp": 2, "zero": True},
}


ALONE = MeshConfig(data=1)


@functools.cache
def setup(name: str, mesh: MeshConfig = ALONE, model=hybrid, **options):
    """The program of a small model."""
    config = model({"optimizer": optimizer(name, **{**STEADY, **options}), "mesh": mesh, "data.batch_size": 8})
    return program_of(config, devices=1 if mesh == ALONE else 8)


def some(like, seed: int):
    """Random arrays like the parameters, laid out as they are."""
    rng = np.random.default_rng(seed)
    return {n: jax.device_put(rng.normal(size=p.shape).astype(np.float32), p.sharding) for n, p in sorted(like.items())}


def updates_of(program, count: int, grads=None):
    """The updates of `count` steps from random gradients (or those given) at fixed parameters, and the last state."""
    params = some(program.like.params, 0)
    state = jax.jit(program.tx.init, out_shardings=program.shardings.optimizer)(params)
    update = quick_jit(program.tx.update, out_shardings=(None, program.shardings.optimizer))
    found = []
    for seed in range(1, count + 1):
        updates, state = update(some(program.like.params, seed) if grads is None else grads, state, params)
        found.append(updates)
    return found, state


@OPTIMIZER
def test_step_moves_every_parameter(name):
    (updates,), _ = updates_of(setup(name), 1)
    assert [n for n, update in updates.items() if not np.all(np.isfinite(update)) or not np.any(update)] == []


@OPTIMIZER
def test_zero_gradient_without_decay_moves_nothing(name):
    program = setup(name, weight_decay=0.0)
    zeros = jax.tree.map(jnp.zeros_like, some(program.like.params, 0))
    for updates in updates_of(program, 2, zeros)[0]:
        assert [n for n, update in updates.items() if np.any(update)] == []


@OPTIMIZER
def test_decay_takes_its_share_of_products_and_of_nothing_else(name):
    program = setup(name, weight_decay=0.5)
    params, zeros = some(program.like.params, 0), jax.tree.map(jnp.zeros_like, some(program.like.params, 0))
    (updates,), _ = updates_of(program, 1, zeros)
    rate = program.config.optimizer.learning_rate
    for n, parameter in program.blueprint.parameters().items():
        assert_close(updates[n], -rate * 0.5 * np.asarray(params[n]) * parameter.decays, err_msg=n)


@OPTIMIZER
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_is_honoured_to_its_last_rate(name, schedule):
    steps, program = 6, setup(name)
    shaped = dataclasses.replace(program.config.optimizer, schedule=schedule, warmup_steps=2, final_ratio=0.25)
    moving = dataclasses.replace(program, tx=make_optimizer(shaped, steps, program.blueprint.parameters()))
    found, expected = updates_of(moving, steps)[0], updates_of(program, steps)[0]
    rates = [float(make_schedule(shaped, steps, 1.0)(step)) for step in range(steps)]
    assert rates[0] == 0.5 and rates[-1] == pytest.approx(0.25)
    for rate, got, want in zip(rates, found, expected, strict=True):
        for n in want:
            assert_close(got[n], rate * np.asarray(want[n]), err_msg=n)


@OPTIMIZER
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_mesh_updates_as_one_device_and_keeps_its_layout(name, mesh):
    model = tiny if "pipeline" in mesh else hybrid
    alone, program = setup(name, model=model), setup(name, MeshConfig(**mesh), model, accumulate=2 if "pipeline" in mesh else 1)
    expected, whole = updates_of(alone, 2)
    found, parts = updates_of(program, 2)
    for got, want in zip(found, expected, strict=True):
        for n in want:
            assert_close(got[n], want[n], err_msg=n)
    kept, reference = tree_arrays(parts), tree_arrays(whole)
    assert kept.keys() == reference.keys()
    for path in reference:
        assert_close(kept[path], reference[path], err_msg=path)
    layouts = program.blueprint.update_shardings(program.mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        owner = next((part.key for part in path if getattr(part, "key", None) in layouts), None)
        if owner is not None and leaf.shape == program.like.params[owner].shape:
            assert leaf.sharding == layouts[owner], jax.tree_util.keystr(path)


@OPTIMIZER
def test_moments_in_bfloat16_are_rounded_between_steps_only(name):
    if name == "sgd":
        moments = {"momentum": 0.9}
    else:
        moments = {"momentum": 0.9, "adam_b1": 0.9} if name == "muon" else {"b1": 0.9}
    whole, halved = setup(name, **moments), setup(name, **moments, moment_dtype="bfloat16")
    (first, second), state = updates_of(whole, 2)
    (got_first, got_second), kept = updates_of(halved, 2)
    for n in first:
        assert_close(got_first[n], first[n], err_msg=n)  # nothing was kept yet
        assert got_second[n].dtype == jnp.float32
        assert np.max(np.abs(got_second[n] - second[n])) <= 0.1 * np.max(np.abs(second[n])), n
    changes = {(str(a.dtype), str(b.dtype)) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True)}
    assert ("float32", "bfloat16") in changes and changes <= {("float32", "bfloat16"), ("float32", "float32"), ("int32", "int32")}
    seconds = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept) if ".nu" in jax.tree_util.keystr(path)]
    assert all(leaf.dtype == jnp.float32 for leaf in seconds) and (seconds or name == "sgd")


@pytest.mark.parametrize("name, decay", [("adamw", "b1"), ("muon", "momentum"), ("muon", "adam_b1"), ("sgd", "momentum")])
def test_moments_that_bfloat16_would_round_away_are_refused(name, decay):
    with pytest.raises(ConfigError, match=f"moment_dtype=bfloat16 rounds away what {decay}=0.99"):
        optimizer(name, **{decay: 0.99}, moment_dtype="bfloat16")
    optimizer(name, **{decay: 0.99})


@OPTIMIZER
def test_plan_counts_what_the_state_takes(name):
    program = setup(name, MeshConfig(**MESHES["fsdp 4 x tensor 2"]))
    counted = state_bytes(program.like, program.config, program.mesh).optimizer
    _, state = updates_of(program, 1)
    assert counted == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


@OPTIMIZER
def test_state_survives_a_checkpoint_on_another_mesh(name, tmp_path, compile_cache):
    program = setup(name)
    state = dataclasses.replace(program.fresh(), optimizer=updates_of(program, 1)[1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, loss=None)
    checkpoints.wait()
    for mesh in (ALONE, MeshConfig(data=1, fsdp=4, tensor=2)):
        like = setup(name, mesh).like
        _, again, _ = checkpoints.restore(like)
        assert different_arrays(again, state) == []
        assert jax.tree.map(lambda a: a.sharding, again) == jax.tree.map(lambda a: a.sharding, like)
    checkpoints.close()


def one_step(program):
    """The state after one training step, and before."""
    fresh = program.fresh()
    # A fresh model's norms blow up vectors of hardly any size, and roundings with them.
    fresh = dataclasses.replace(fresh, params={**fresh.params, "embedding": 50 * fresh.params["embedding"]})
    step = quick_jit(make_step(program.blueprint, program.tx, program.mesh, None), out_shardings=(program.shardings, None))
    state, _ = step(fresh, jax.device_put(random_batch(8), program.layout.sharding))
    return state, fresh


@pytest.mark.parametrize("name", usually(OPTIMIZERS.all(), "muon"))
def test_accumulation_and_moments_in_host_memory_change_nothing(name, compile_cache):
    """Moments are compared: they follow what was accumulated, where an update may be its sign alone."""
    alone, _ = one_step(setup(name, model=tiny))
    state, fresh = one_step(setup(name, MeshConfig(data=2, fsdp=2, offload="optimizer"), tiny, accumulate=2))
    assert {a.sharding.memory_kind for a in jax.tree.leaves(state.optimizer) if a.ndim} <= {"pinned_host"}
    assert different_arrays(state.params, fresh.params) == sorted(tree_arrays(fresh.params))
    found, expected = tree_arrays(state.optimizer), tree_arrays(alone.optimizer)
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        root = np.sqrt if ".nu[" in path else np.asarray  # a square has twice the relative error of its gradient
        assert_close(root(found[path]), root(want), err_msg=path)


@OPTIMIZER
def test_config_survives_json(name):
    config = tiny({"optimizer": optimizer(name, learning_rate=0.25, warmup_steps=1)})
    assert decode(ExperimentConfig, encode(config)) == config


@OPTIMIZER
@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.0), ("learning_rate", float("inf")), ("weight_decay", -1.0), ("accumulate", 0)]
)
def test_shared_options_are_checked_and_named(name, field, value):
    with pytest.raises(ConfigError, match=f"optimizer.{field}={value} must be"):
        optimizer(name, **{field: value})


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(ValueError, match="optimizer 'adam' is not registered; did you mean 'adamw'"):
        optimizer("adam")


def test_momentum_that_is_not_kept_has_no_state_and_nesterov_needs_it():
    assert [a.shape for a in jax.tree.leaves(setup("sgd", momentum=None).like.optimizer)] == [()]  # the count of the schedule
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov=True needs momentum"):
        optimizer("sgd", momentum=None, nesterov=True)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_are_those_worked_by_hand(nesterov):
    program = setup("sgd", learning_rate=0.5, momentum=0.75, nesterov=nesterov, weight_decay=0.25)
    found = updates_of(program, 3)[0]
    params = some(program.like.params, 0)
    for n, parameter in program.blueprint.parameters().items():
        momentum = np.zeros(parameter.shape)
        for seed, update in enumerate(found, start=1):
            g = np.asarray(some(program.like.params, seed)[n], np.float64)
            momentum = 0.75 * momentum + g
            direction = g + 0.75 * momentum if nesterov else momentum
            assert_close(update[n], -0.5 * (direction + 0.25 * parameter.decays * np.asarray(params[n], np.float64)), err_msg=n)

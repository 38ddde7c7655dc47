"""Experts on the mesh: the numbers of one device for any load, biases that move once a step, and clear refusals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.mesh import MESH_AXES, MeshConfig
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.channel_mixers.moe import MoEConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import program_of, random_batch, tiny, tree_arrays
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps
from plait.train.mesh import make_mesh, on_mesh
from plait.train.step import make_step

MOE = MoEConfig(num_experts=4, top_k=2, hidden_dim=16, num_shared_experts=1, balance_bias=0.01)
STEP = {**SIZES, "model.channel_mixer": MOE, "optimizer.accumulate": 2}
COVER = [("fsdp", "expert", "tensor"), ("pipeline", "expert", "context")]
PAIRS = [("expert",), *(pair for pair in itertools.combinations(MESH_AXES, 2) if "expert" in pair)]


def on(axes: tuple[str, ...], **options) -> MeshConfig:
    return MeshConfig(**{"data": 1, **dict.fromkeys(axes, 2), **options})


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(on(COVER[0], zero=True), id=" x ".join(COVER[0])),
        pytest.param(on(COVER[1], zero=True), id=" x ".join(COVER[1]), marks=pytest.mark.slow),
        *(pytest.param(on(axes), id=" x ".join(axes), marks=pytest.mark.slow) for axes in PAIRS),
    ],
)
def test_experts_train_as_one_device(mesh, compile_cache):
    config = tiny(STEP)
    found, expected = two_steps(dataclasses.replace(config, mesh=mesh)), two_steps(config)
    assert_same_training(found, expected)
    got, want = tree_arrays(found[1].buffers), tree_arrays(expected[1].buffers)
    assert any(np.any(bias) for bias in want.values())
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_expert_axis_is_a_data_axis_to_layers_without_experts(compile_cache):
    assert_same_training(two_steps(tiny({**SIZES, "mesh": on(("expert", "fsdp"))})), two_steps(tiny(SIZES)))


@pytest.mark.parametrize("rows", [8, 3], ids=["rows divided", "rows that do not divide"])
@pytest.mark.parametrize("favourites", [(3,), (0, 1)], ids=str)
def test_any_load_gives_what_one_device_gives(favourites, rows):
    """All tokens go to one expert, or to the two of one device."""
    config = dataclasses.replace(MOE, top_k=len(favourites), normalize=False, num_shared_experts=0)
    mixer = config.build(32, BuildContext(rngs=nnx.Rngs(0), seq_len=8))
    column = jnp.zeros(4).at[jnp.array(favourites)].set(jnp.array([2.0, 1.0][: len(favourites)]))
    mixer.router.kernel[...] = jnp.broadcast_to(column[None], (32, 4))
    graph, variables = nnx.split(mixer)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (rows, 8, 32)))
    mesh = make_mesh(MeshConfig(data=2, expert=4))

    def run(variables, x):
        y, pull = jax.vjp(lambda v, x: nnx.merge(graph, v)(x, at=Tokens()).y, variables, x)
        return y, pull(jnp.cos(y))

    def divided(variables, x):
        with on_mesh(mesh):
            return run(variables, x)

    found, expected = quick_jit(divided)(variables, x), quick_jit(run)(variables, x)
    for (path, got), want in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(got, want, err_msg=jax.tree_util.keystr(path))


def test_biases_move_once_a_step_and_not_in_a_skipped_one(compile_cache):
    def after(**changes):
        setup = program_of(tiny({**STEP, **changes}))
        step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, None))
        state = setup.fresh()
        for bounds in (None, jnp.zeros(2)):  # a loss above 0 is out of bounds
            state, metrics = step(state, random_batch(8), bounds)
        assert metrics["optimizer/skipped_steps"] == 1
        return state.buffers

    whole, parts = after(**{"optimizer.accumulate": 1}), after()
    assert set(np.unique(np.abs(np.concatenate([b.ravel() for b in whole.values()])))) <= {0.0, np.float32(0.01)}
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_experts_that_the_axis_does_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"mesh.expert=4 must divide the 6 experts of model.channel_mixer; use one of 1, 2, 3, 6"
    ):
        tiny({**STEP, "model.channel_mixer": dataclasses.replace(MOE, num_experts=6), "mesh": on((), expert=4)})

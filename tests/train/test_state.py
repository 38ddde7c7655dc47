"""A model taken apart into named arrays and put together again."""

import jax
import numpy as np
import pytest

from plait.models.layers.linear import SpectralVector
from plait.tests.train.common import changed, different_arrays, program_of, routed, tiny
from plait.train.state import create_state


@pytest.fixture(scope="module")
def setup():
    return program_of(routed({"model.sigma_reparam": "one", "optimizer.ema": 0.9}))


@pytest.fixture(scope="module")
def state(setup):
    return create_state(setup.blueprint, setup.tx)


def test_model_apart_and_together_is_the_same(setup, state):
    model = setup.blueprint.build(state.params, state.buffers)
    params, buffers = setup.blueprint.split(model)
    assert different_arrays((params, buffers), (state.params, state.buffers)) == []


def test_names_say_where_an_array_is(state):
    names = {"embedding", "head.kernel", "stack.rest.0.mixer.inner.q.kernel", "stack.rest.0.channel_mixer.up.gain"}
    assert names <= state.params.keys()
    assert all(name.rpartition(".")[2] in ("u", "v") for name in state.buffers)


def test_singular_vectors_are_buffers_and_never_trained(setup, state):
    assert not state.params.keys() & state.buffers.keys()
    kinds = {name: isinstance(v, SpectralVector) for name, v in setup.blueprint._variables.items()}
    assert {name for name, spectral in kinds.items() if spectral} == state.buffers.keys()
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    assert not {part.key for path, _ in moments for part in path if hasattr(part, "key")} & state.buffers.keys()


def test_state_is_complete_at_step_0(setup, state):
    assert int(state.step) == int(state.bad_steps) == int(state.skipped) == 0
    assert different_arrays(state.ema, state.params) == []
    assert setup.blueprint.num_params == sum(p.size for p in state.params.values())


def test_seed_decides_the_parameters():
    one, again, other = (create_state(s.blueprint, s.tx).params for s in (program_of(tiny({"seed": seed})) for seed in (0, 0, 1)))
    assert different_arrays(one, again) == []
    assert any("kernel" in name for name in different_arrays(one, other))


def test_abstract_state_matches_the_real_one(setup):
    like, real = setup.like, setup.fresh()
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), like) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), real
    )


def test_parameter_dtype_reaches_every_parameter_but_rates_and_no_moment():
    setup = program_of(changed(tiny(), {"model.param_dtype": "bfloat16"}))
    like = setup.like
    rates = {name for name in like.params if name.endswith((".A_log", ".dt_bias"))}
    assert {name for name, p in like.params.items() if p.dtype == np.float32} == rates
    assert {str(p.dtype) for name, p in like.params.items() if name not in rates} == {"bfloat16"}
    np.testing.assert_equal({str(a.dtype) for a in jax.tree.leaves(like.optimizer) if a.ndim}, {"float32"})

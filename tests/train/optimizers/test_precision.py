"""Parameters in bfloat16: sums, factors and draws are float32 all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.optimizer import OPTIMIZERS, Parameter, optimizer
from plait.models.build import BuildContext
from plait.models.mixers.base import MIXERS
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import hybrid, mixture, program_of, random_batch, tiny
from plait.train.optimizers import make_optimizer
from plait.train.state import Blueprint
from plait.train.step import _accumulate, make_step

HALVED = {"model.param_dtype": "bfloat16"}
VECTOR = Parameter("w", (4,), (None,), "vector")
TINIEST = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}


@pytest.mark.parametrize("model", [tiny, hybrid, mixture])
def test_parameters_are_the_float32_ones_rounded_once(model):
    vocabulary = {"model.vocab_size": 300}
    drawn, _ = jax.jit(Blueprint(model(vocabulary)).init)()
    rounded, _ = jax.jit(Blueprint(model(vocabulary | HALVED)).init)()
    for name, value in drawn.items():
        np.testing.assert_array_equal(rounded[name], value.astype(rounded[name].dtype), err_msg=name)


@pytest.mark.parametrize("name", MIXERS.all())
def test_every_mixer_draws_in_float32(name):
    def drawn(dtype):
        ctx = BuildContext(rngs=nnx.Rngs(0), seq_len=8, param_dtype=dtype)
        return nnx.to_flat_state(nnx.state(MIXERS[name].example().build(64, ctx), nnx.Param))

    for (path, whole), (_, rounded) in zip(drawn(jnp.float32), drawn(jnp.bfloat16), strict=True):
        np.testing.assert_array_equal(rounded[...], whole[...].astype(rounded[...].dtype), err_msg=str(path))


def test_average_is_float32_and_arrives():
    program = program_of(tiny(HALVED | {"optimizer.ema": 0.999, "optimizer.learning_rate": 1e-2}))
    state = program.fresh()
    step = quick_jit(make_step(program.blueprint, program.tx, program.mesh, None))
    expected = {name: np.asarray(p, np.float64) for name, p in state.params.items()}
    for seed in range(5):
        state, _ = step(state, random_batch(seed=seed))
        expected = {name: 0.999 * old + 0.001 * np.asarray(state.params[name], np.float64) for name, old in expected.items()}
    for name, average in state.ema.items():
        assert average.dtype == jnp.float32
        assert_close(average, expected[name].astype(np.float32), err_msg=name)


def test_second_moment_forgets_a_burst():
    tx = make_optimizer(optimizer("adamw", **TINIEST, learning_rate=1.0, b1=0.0, b2=0.999, eps=1e-12), 10**5, {"w": VECTOR})
    params = {"w": jnp.zeros(4, jnp.bfloat16)}

    def steps(state, grad, count):
        return jax.lax.fori_loop(0, count, lambda _, s: tx.update({"w": jnp.full(4, grad, jnp.bfloat16)}, s, params)[1], state)

    state = steps(steps(tx.init(params), 1.0, 20), 0.01, 12_000)
    update, _ = tx.update({"w": jnp.full(4, 0.01, jnp.bfloat16)}, state, params)
    assert np.asarray(update["w"]) == pytest.approx(-1.0, rel=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS.all())
def test_updates_are_those_of_float32_parameters(name):
    """Gradients and parameters that bfloat16 holds exactly give the very updates of float32 ones."""
    program = program_of(tiny({"optimizer": optimizer(name, **{**TINIEST, "weight_decay": 0.1})}))
    rng = np.random.default_rng(0)
    draw = lambda: {n: jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16) for n, p in sorted(program.like.params.items())}
    params, grads = draw(), draw()
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    update = quick_jit(program.tx.update)
    updates, _ = update(grads, program.tx.init(params), params)
    expected, _ = update(wide(grads), program.tx.init(wide(params)), wide(params))
    for n in expected:
        np.testing.assert_array_equal(updates[n], expected[n], err_msg=n)


def test_micro_batches_are_added_up_in_float32():
    rows = jnp.asarray(np.concatenate([[256.0], np.ones(63)]), jnp.float32)  # in bfloat16 256 + 1 is 256

    def loss(params, batch):
        value = (params["w"].astype(jnp.float32) * batch).sum()
        return value, {"extras": [], "losses": {"train": value}}

    grads, _ = _accumulate(jax.value_and_grad(loss, has_aux=True), {"w": jnp.ones((), jnp.bfloat16)}, rows, 64)
    assert grads["w"].dtype == jnp.float32 and float(grads["w"]) == 256 + 63

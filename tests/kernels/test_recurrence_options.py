"""Statistics and the state normaliser of the linear recurrences, in the implementations that run anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens
from plait.kernels.recurrence import SPAN, RecurrenceStats
from plait.kernels.shapes import l2_normalize
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close, assert_tree_close, in_float64

DECAYS = ("scalar_decay", "vector_decay")


def _with_stats(name: str, implementation: str, chunk_size: int):
    @cases.quick_jit
    def run(inputs, state, ids):
        return cases.RECURRENCES[name].call(
            inputs,
            initial_state=state,
            at=Tokens(None, ids),
            implementation=implementation,
            chunk_size=chunk_size,
            return_stats=True,
        )

    return run


@pytest.mark.parametrize(("chunk_size", "layout"), [(16, "several"), (256, None)])
@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_chunked_statistics_match_reference(name: str, chunk_size: int, layout: str | None):
    args = cases.RECURRENCES[name].inputs(300), cases.state(), None if layout is None else cases.segments(300, layout)
    plain = _with_stats(name, "reference", 16)
    got = _with_stats(name, "chunked", chunk_size)(*args)
    assert all(x.shape == (cases.BATCH, 3, cases.NUM_HEADS) and x.dtype == jnp.float32 for x in got[2])
    assert_tree_close(got, in_float64(plain, *args), plain(*args), dtype="float32")


@pytest.mark.parametrize("name", DECAYS)
def test_statistics_are_what_they_say(name: str):
    inputs, ids = cases.RECURRENCES[name].inputs(200), cases.segments(200, "several")
    _, state, stats = _with_stats(name, "chunked", 64)(inputs, cases.state(), ids)
    assert isinstance(stats, RecurrenceStats)
    assert_close(stats.state_norm[:, -1], jnp.linalg.norm(state, axis=(-2, -1)))
    real = np.asarray(ids[:, :SPAN] != 0)[..., None]
    count = real.sum(1)
    np.testing.assert_array_equal(stats.num_tokens[:, 0], np.broadcast_to(count, stats.num_tokens[:, 0].shape))
    norm = lambda x: np.linalg.norm(np.asarray(x)[:, :SPAN], axis=-1)
    assert_close(stats.write_strength[:, 0], (norm(inputs["k"]) * norm(inputs["v"]) * real).sum(1) / count)
    g = np.asarray(inputs["g"])[:, :SPAN]
    rate = -(g if g.ndim == 3 else g.mean(-1))
    assert_close(stats.decay_horizon[:, 0], count / (rate * real).sum(1))


def test_statistics_pass_no_gradient():
    inputs = cases.RECURRENCES["kda"].inputs(20)

    def total(inputs):
        stats = cases.RECURRENCES["kda"].call(inputs, return_stats=True)[2]
        return sum(jnp.sum(x) for x in stats)

    assert not any(np.asarray(x).any() for x in jax.tree.leaves(cases.quick_jit(jax.grad(total))(inputs)))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", DECAYS)
def test_normalized_outputs_are_weighted_means(name: str, implementation: str):
    length, rows = 90, jnp.arange(90)
    recurrence, ids = cases.RECURRENCES[name], cases.segments(length, "several")
    inputs = recurrence.inputs(length)
    inputs |= {x: jnp.exp(inputs[x]) for x in "qk"}  # a positive feature map

    @cases.quick_jit
    def run(inputs):
        o, state = recurrence.call(inputs, at=Tokens(None, ids), normalize=True, implementation=implementation, chunk_size=32)
        return o, state, recurrence.implied(inputs, rows, at=Tokens(None, ids), chunk_size=32)

    o, state, weights = run(inputs)
    assert state.shape == (cases.BATCH, cases.NUM_HEADS, cases.KEY_DIM, cases.VALUE_DIM + 1)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    assert_close(o, jnp.einsum("bhrs,bshv->brhv", weights, inputs["v"]))
    assert not np.asarray(o)[np.asarray(ids) == 0].any()


@pytest.mark.parametrize("name", DECAYS)
def test_normalized_steps_equal_one_call(name: str):
    recurrence = cases.RECURRENCES[name]
    inputs = recurrence.inputs(6)
    inputs |= {x: jnp.exp(inputs[x]) for x in "qk"}

    @cases.quick_jit
    def both(inputs):
        first, state = recurrence.call({key: x[:, :4] for key, x in inputs.items()}, normalize=True)
        rest, state = recurrence.call({key: x[:, 4:] for key, x in inputs.items()}, normalize=True, initial_state=state)
        return recurrence.call(inputs, normalize=True), (jnp.concatenate([first, rest], axis=1), state)

    (whole, whole_state), (steps, state) = both(inputs)
    assert_close(steps, whole)
    assert_close(state, whole_state)


@pytest.mark.parametrize("name", DECAYS)
def test_normalized_gradients_are_finite(name: str):
    recurrence, ids = cases.RECURRENCES[name], jnp.zeros((cases.BATCH, 20), jnp.int32).at[:, 3:9].set(1)
    inputs = recurrence.inputs(20, dtype=jnp.bfloat16)
    inputs |= {x: jnp.exp(inputs[x]) for x in "qk"}

    def total(inputs):
        o, state = recurrence.call(inputs, normalize=True, at=Tokens(None, ids))
        assert o.dtype == jnp.bfloat16
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cases.quick_jit(jax.grad(total))(inputs)))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_l2_norm_is_that_of_queries_and_keys(name: str, implementation: str):
    recurrence, rows = cases.RECURRENCES[name], jnp.array([0, 40, 69])
    inputs = recurrence.inputs(70)
    inputs |= {"q": 3 * inputs["q"], "k": inputs["k"] / 4}
    normalized = inputs | {key: l2_normalize(inputs[key], 1e-4) for key in "qk"}

    def outputs(inputs, **options):
        o, _ = cases.quick_jit(partial(recurrence.call, implementation=implementation, **options))(inputs)
        return o, recurrence.implied(inputs, rows, **options)

    jax.tree.map(assert_close, outputs(inputs, l2_norm_eps=1e-4), outputs(normalized))


def test_l2_norm_eps_must_be_above_0():
    with pytest.raises(ValueError, match=r"delta_rule: l2_norm_eps=0.0 must be above 0; use 1e-6, or None"):
        cases.RECURRENCES["deltanet"].call(cases.RECURRENCES["deltanet"].inputs(8), l2_norm_eps=0.0)

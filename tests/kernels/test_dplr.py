"""The diagonal plus rank one: a case by hand, long sequences, and the ops that it holds as special cases."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens, decay, delta_rule, dplr
from plait.tests.kernels import cases, loops
from plait.tests.tolerances import assert_close, in_float64

FORMS = ["reference", "chunked"]


@pytest.mark.parametrize("form", FORMS)
def test_state_is_read_along_a_before_it_decays(form: str):
    """Three tokens, one key and one value channel: S = (w + b a) S + k v, worked out."""
    row = lambda *x: jnp.asarray(x, jnp.float32).reshape(1, 3, 1, 1)
    w, a, b, k, v = (1, 0.5, 0.25), (9, -1, -0.5), (9, 0.5, 1), (2, 1, 1), (3, 4, 0)
    o, state = dplr(row(1, 1, 2), row(*k), row(*v), jnp.log(row(*w)), row(*a), row(*b), scale=1.0, implementation=form)
    # S_1 = 2 * 3 = 6;  S_2 = (0.5 - 0.5) 6 + 4 = 4;  S_3 = (0.25 - 0.5) 4 + 0 = -1
    assert_close(o.ravel(), np.array([6, 4, -2.0]), dtype="float32")
    assert_close(state.ravel(), np.array([-1.0]), dtype="float32")


@pytest.mark.parametrize("strength", ["total", "weak"])
def test_long_sequences_of_strong_and_weak_decay_match_the_loop(strength: str):
    named, ids = cases.RECURRENCES["dplr"].inputs(500, decay=strength), np.ones((cases.BATCH, 500), int)
    o, state = cases.jitted("dplr", "chunked")(named, cases.state())
    expected = loops.recurrence(cases.state(), ids, **named)
    assert_close(o, expected[0])
    assert_close(state, expected[1])


def test_the_delta_rule_is_one():
    """KDA reads its decayed state along k, and writes beta k."""
    named = cases.RECURRENCES["kda"].inputs(70, beta=0.7)
    q, k, v, g, beta = (jnp.repeat(named[x], 2, axis=2) if x in "qk" else named[x] for x in ("q", "k", "v", "g", "beta"))
    expected, wanted = delta_rule(q, k, v, g, beta)
    o, state = dplr(q, beta[..., None] * k, v, g, -jnp.exp(g) * k, beta[..., None] * k)
    assert_close(o, expected)
    assert_close(state, wanted)


def test_without_a_it_decays_and_adds():
    named = cases.RECURRENCES["dplr"].inputs(70)
    nothing = jnp.zeros_like(named["a"])
    o, state = dplr(named["q"], named["k"], named["v"], named["g"], nothing, named["b"])
    expected, wanted = decay(named["q"], named["k"], named["v"], named["g"])
    assert_close(o, expected)
    assert_close(state, wanted)


def test_gradients_are_those_of_finite_differences():
    named, ids = cases.RECURRENCES["dplr"].inputs(37, decay="weak"), cases.segments(37, "several")
    named |= {"g": named["g"] - 0.3}
    rng = np.random.default_rng(0)
    along = {key: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32) for key, x in named.items()}

    @cases.quick_jit
    def both(named: Any, along: Any) -> tuple[jax.Array, jax.Array]:
        def total(named: Any) -> jax.Array:
            o, state = cases.RECURRENCES["dplr"].call(named, at=Tokens(None, ids), chunk_size=8)
            return jnp.sum(jnp.sin(3 * o)) + jnp.sum(jnp.sin(state))

        step = lambda size: jax.tree.map(lambda x, d: x + size * d, named, along)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(total)(named), along))))
        return slope, (total(step(1e-5)) - total(step(-1e-5))) / 2e-5

    slope, difference = in_float64(both, named, along)
    assert_close(slope, difference, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"a": x["a"][..., :2]}, "a.shape=(2, 5, 1, 2) must be [B, T, Hqk, K] as k = (2, 5, 1, 8)"),
        (lambda x: x | {"g": x["g"][..., 0]}, "g.shape=(2, 5, 2) must be [B, T, Hv, K] = (2, 5, 2, 8)"),
        (lambda x: x | {"g": -x["g"]}, "a log decay must be at most 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str):
    with pytest.raises(ValueError) as error:
        cases.RECURRENCES["dplr"].call(change(cases.RECURRENCES["dplr"].inputs(5)))
    assert message in str(error.value)

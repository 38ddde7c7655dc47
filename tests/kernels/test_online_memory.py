"""The memory that learns while it reads: the chunk form against one token after the other, and both against NumPy and the delta rule."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens, delta_rule, online_memory
from plait.kernels.online_memory import Rule
from plait.tests.kernels.cases import quick_jit, with_gradients
from plait.tests.models.common import layout, left_padded
from plait.tests.tolerances import assert_close, in_float64

BATCH, LENGTH, HEADS, DIM, HIDDEN = 2, 22, 2, 8, 12
RULES = {
    "linear": (1, Rule(chunk_size=4)),
    "mlp": (2, Rule(chunk_size=8)),
    "deep": (3, Rule(chunk_size=5)),
    "lq": (2, Rule(residual=True, p=3.0, retention="lq", chunk_size=4)),
    "huber": (2, Rule(residual=True, bias="huber", chunk_size=8)),
    "kl": (2, Rule(residual=True, retention="kl", chunk_size=4)),
    "every_token": (2, Rule(residual=True, p=3.0, retention="lq", chunk_size=1)),
}


def inputs(depth: int, rule: Rule, *, seed: int = 0, length: int = LENGTH, batch: int = BATCH) -> dict:
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k, v = rng.normal(size=(3, batch, length, HEADS, DIM))
    channels = (DIM,) if rule.residual else ()
    widths = [DIM, *[HIDDEN] * (depth - 1), DIM]
    named = {
        "q": unit(q),
        "k": unit(k),
        "v": v,
        "initial": [(2.0 if rule.retention == "kl" else 0.5) * rng.normal(size=(HEADS, *w)) for w in itertools.pairwise(widths)],
    }
    named["g"] = -rng.exponential(0.3, (batch, length, HEADS, *channels))
    # A residual memory has steep slopes (a layer norm of few channels, `tanh(10 e)`): at larger steps it amplifies roundings a
    # thousandfold within these lengths.
    named["step"] = rng.uniform(0, 0.005 if rule.residual else 0.3, (batch, length, HEADS, *channels))
    if not rule.residual:
        named["momentum"] = -rng.exponential(1.0, (batch, length, HEADS))
    if rule.bias == "huber":
        named["threshold"] = rng.uniform(1.0, 3.0, (batch, length, HEADS))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), named)


def run(rule: Rule, implementation: str, at: Tokens | None = None, state=None):
    def outputs(inputs):
        o, state_after, written = online_memory(
            **{**inputs, "initial": tuple(inputs["initial"])},
            rule=rule,
            at=at,
            initial_state=state,
            implementation=implementation,
        )
        return {"o": o, "state": state_after, "written": written}

    return outputs


@pytest.mark.parametrize("name", RULES)
def test_chunks_equal_one_token_after_the_other(name):
    """Outputs, state and gradients, second-order ones with them, in float64; documents begin within chunks of the row."""
    depth, rule = RULES[name]
    at = layout((9, 1, 3, 7), (LENGTH,), length=LENGTH)
    got, want = (
        in_float64(quick_jit(lambda x, form=form: with_gradients(run(rule, form, at), x)), inputs(depth, rule))
        for form in ("chunked", "reference")
    )
    jax.tree.map(
        lambda a, b: assert_close(a, b, dtype="float64") if a.dtype == np.float64 else np.testing.assert_array_equal(a, b),
        got,
        want,
    )


@pytest.mark.parametrize("name", ["mlp", "lq", "kl"])
@pytest.mark.parametrize("form", ["chunked", "reference"])
def test_packed_padded_and_continued_are_alone(name, form):
    depth, rule = RULES[name]
    x = inputs(depth, rule, batch=1)
    tokens = {key: a for key, a in x.items() if key != "initial"}
    part = lambda start, stop: {**{key: a[:, start:stop] for key, a in tokens.items()}, "initial": x["initial"]}
    packed = quick_jit(run(rule, form, layout((9, 13), length=LENGTH)))(x)["o"]
    alone = quick_jit(run(rule, form))(part(9, LENGTH))
    assert_close(packed[:, 9:], alone["o"])
    at, _ = left_padded(13)
    at = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (9, 0))), at)
    assert_close(quick_jit(run(rule, form, at))(x)["o"][:, 9:], alone["o"])
    first = quick_jit(run(rule, form))(part(9, 16))
    place = lambda start, stop: Tokens(positions=jnp.arange(start, stop)[None])
    second = quick_jit(run(rule, form, place(7, 13), first["state"]))(part(16, LENGTH))
    assert_close(jnp.concatenate([first["o"], second["o"]], 1), alone["o"])
    jax.tree.map(assert_close, second["state"].accumulated, alone["state"].accumulated)


def test_three_tokens_by_hand():
    """A linear memory of one channel, W_0 = 1; k = 1, v = 0, 1, 2, so that a gradient is 2 (W - v); chunks of 1, then of 2."""
    one = lambda *numbers: jnp.asarray(numbers, jnp.float32).reshape(1, -1, 1)
    kept, eta, theta = (0.5, 0.25, 0.5), (0.5, 0.5, 0.5), (0.25, 0.5, 0.25)
    arguments = {
        **{name: one(*values)[..., None] for name, values in {"q": (1, 2, 1), "k": (1, 1, 1), "v": (0, 1, 2)}.items()},
        "g": jnp.log(one(*kept)),
        "step": one(*theta),
        "momentum": jnp.log(one(*eta)),
        "initial": [jnp.ones((1, 1, 1))],
    }
    # t=1: S = -0.25 * 2 = -0.5, W = 0.5 - 0.5 = 0.  t=2 at W=0: S = -0.25 - 0.5 * 2 * (0 - 1) = 0.75, W = 0.75.
    # t=3 at W=0.75: S = 0.375 - 0.25 * 2 * (0.75 - 2) = 1, W = 0.375 + 1.
    for form in ("chunked", "reference"):
        o = quick_jit(run(Rule(chunk_size=1), form))(arguments)["o"]
        assert_close(o[0, :, 0, 0], np.array([0.0, 1.5, 1.375]))
    # chunk of 2: t=2 at W=1: S = -0.25 - 0 = -0.25, W = -0.25.  t=3 at W=-0.25: S = -0.125 + 0.5 * 2.25 = 1, W = -0.125 + 1.
    for form in ("chunked", "reference"):
        o = quick_jit(run(Rule(chunk_size=2), form))(arguments)["o"]
        assert_close(o[0, :, 0, 0], np.array([0.0, -0.5, 0.875]))


def test_a_linear_memory_without_momentum_is_the_delta_rule():
    """With nothing forgotten and a chunk of 1: the gradient of |M k - v|^2 writes beta = 2 theta."""
    x = inputs(1, Rule())
    x = {**x, "initial": [jnp.zeros((HEADS, DIM, DIM))], "g": jnp.zeros_like(x["g"])}
    del x["momentum"]
    expected, _ = quick_jit(lambda x: delta_rule(x["q"], x["k"], x["v"], None, 2 * x["step"], scale=1.0))(x)
    assert_close(quick_jit(run(Rule(chunk_size=1), "chunked"))(x)["o"], expected)


def test_a_memory_of_two_layers_in_numpy():
    """The same as loops with the gradient written out, momentum and chunks of 3; shares nothing with the op."""
    rule = Rule(chunk_size=3)
    x = inputs(2, rule, length=8, batch=1)
    got = in_float64(quick_jit(run(rule, "chunked")), x)["o"]
    erf = np.vectorize(math.erf)
    gelu = lambda z: 0.5 * z * (1 + erf(z / 2**0.5))
    slope = lambda z: 0.5 * (1 + erf(z / 2**0.5)) + z * np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5
    a = {key: np.asarray(value, np.float64)[0] for key, value in x.items() if key != "initial"}
    for h in range(HEADS):
        w = [np.asarray(layer, np.float64)[h] for layer in x["initial"]]
        s = [np.zeros_like(layer) for layer in w]
        for t in range(8):
            if t % 3 == 0:
                at = [layer.copy() for layer in w]
            k, z = a["k"][t, h], a["k"][t, h] @ at[0]
            e = 2 * (gelu(z) @ at[1] - a["v"][t, h])
            u = [np.outer(k, (at[1] @ e) * slope(z)), np.outer(gelu(z), e)]
            s = [np.exp(a["momentum"][t, h]) * old - a["step"][t, h] * new for old, new in zip(s, u)]
            w = [np.exp(a["g"][t, h]) * old + new for old, new in zip(w, s)]
            np.testing.assert_allclose(got[0, t, h], gelu(a["q"][t, h] @ w[0]) @ w[1], rtol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "lq", "kl"])
def test_second_order_gradients_flow(name):
    """The derivative along a direction of everything equals differences, in float64: nothing stops at the gradients of the memory."""
    depth, rule = RULES[name]
    size = lambda x: jnp.square(run(rule, "chunked")(x)["o"]).sum()
    direction = jax.tree.map(lambda a: a * jnp.cos(jnp.arange(a.size)).reshape(a.shape), inputs(depth, rule, seed=3))
    moved = lambda x, step: size(jax.tree.map(lambda a, d: a + step * d, x, direction))
    both = quick_jit(lambda x: ((moved(x, 1e-6) - moved(x, -1e-6)) / 2e-6, jax.jvp(lambda t: moved(x, t), (0.0,), (1.0,))[1]))
    with jax.enable_x64(True):
        direction = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), direction)
        differences, along = both(jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), inputs(depth, rule)))
    np.testing.assert_allclose(along, differences, rtol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "lq", "kl", "huber"])
def test_gradients_are_finite_where_gates_are_shut(name):
    depth, rule = RULES[name]
    x = inputs(depth, rule)
    shut = {key: jnp.full_like(x[key], -1e4) for key in ("g", "momentum") if key in x} | {"step": jnp.zeros_like(x["step"])}
    found = quick_jit(lambda x: with_gradients(run(rule, "chunked"), x))({**x, **shut})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": jnp.ones((BATCH, LENGTH, HEADS))}, "threshold belongs to the bias 'huber'"),
        ({"g": jnp.zeros((BATCH, LENGTH))}, r"g.shape=\(2, 22\) must be \[B, T, H\]"),
        ({"initial": [jnp.ones((HEADS, DIM, HIDDEN))]}, r"initial\[0\].shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(Rule(), "auto")({**inputs(1, Rule()), **change})


def test_kl_has_two_layers():
    rule = RULES["kl"][1]
    with pytest.raises(ValueError, match="'kl' is of two layers"):
        run(rule, "auto")(inputs(1, rule))

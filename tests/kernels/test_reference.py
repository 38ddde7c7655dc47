"""The references themselves: hand-worked cases, second formulations, identities between methods, and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from plait import kernels
from plait.kernels import LowRankBias, Mask, Tokens
from plait.kernels.chunking import decayed_scores, unit_lower_inverse
from plait.tests.kernels import cases
from plait.tests.tolerances import assert_close

HALF = float(np.log(0.5))
IMPLEMENTATIONS = ["reference", "chunked"]


def _heads(*tokens: object) -> jax.Array:
    """One sequence with one head: tokens that are scalars or vectors to [1, T, 1, ...]."""
    return jnp.asarray(tokens, jnp.float32)[None, :, None]


# keys e1, e1 + e2, e2 and scalar values 2, 3, 5; queries all e1 + e2
Q, K, V = _heads([1, 1], [1, 1], [1, 1]), _heads([1, 0], [1, 1], [0, 1]), _heads([2], [3], [5])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scalar_decay_by_hand(implementation: str):
    # S1 = (2, 0); S2 = (1, 0) + (3, 3) = (4, 3); S3 = (2, 1.5) + (0, 5) = (2, 6.5)
    run = cases.quick_jit(partial(kernels.decay, scale=1.0, implementation=implementation))
    o, state = run(Q, K, V, _heads(HALF, HALF, HALF))
    np.testing.assert_allclose(o[0, :, 0, 0], [2, 7, 8.5], rtol=1e-6)
    np.testing.assert_allclose(state[0, 0, :, 0], [2, 6.5], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vector_decay_by_hand(implementation: str):
    # the first channel halves, the second keeps: S2 = (1, 0) + (3, 3) = (4, 3); S3 = (2, 3) + (0, 5) = (2, 8)
    run = cases.quick_jit(partial(kernels.decay, scale=1.0, implementation=implementation))
    o, state = run(Q, K, V, _heads(*[[HALF, 0.0]] * 3))
    np.testing.assert_allclose(o[0, :, 0, 0], [2, 7, 10], rtol=1e-6)
    np.testing.assert_allclose(state[0, 0, :, 0], [2, 8], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_delta_rule_by_hand(implementation: str):
    # beta 1, 1/2, 1: S1 = (2, 0); decayed (1, 0), error 3 - 1 = 2, S2 = (2, 1); decayed (1, 1/2), error 9/2, S3 = (1, 5)
    run = cases.quick_jit(partial(kernels.delta_rule, scale=1.0, implementation=implementation))
    o, state = run(Q, K, V, _heads(HALF, HALF, HALF), _heads(1.0, 0.5, 1.0))
    np.testing.assert_allclose(o[0, :, 0, 0], [2, 3, 6], rtol=1e-6)
    np.testing.assert_allclose(state[0, 0, :, 0], [1, 5], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_by_hand(implementation: str):
    q, k = _heads([1], [1], [1]), _heads([0.0], [np.log(3.0)], [np.log(4.0)])  # weights 1 : 3 : 4
    plain = partial(kernels.attention, scale=1.0, return_stats=True, implementation=implementation)
    run = lambda **options: jax.tree.map(np.asarray, cases.quick_jit(partial(plain, **options))(q, k, V))
    o, stats = run(mask=Mask())
    np.testing.assert_allclose(o[0, :, 0, 0], [2, 11 / 4, 31 / 8], rtol=1e-6)
    np.testing.assert_allclose(stats.lse[0, :, 0], np.log([1, 4, 8]), atol=1e-6)
    np.testing.assert_allclose(stats.max_logit[0, :, 0], np.log([1, 3, 4]), atol=1e-6)
    rows = [np.array(row) / sum(row) for row in ([1], [1, 3], [1, 3, 4])]
    np.testing.assert_allclose(stats.entropy[0, :, 0], [-(p * np.log(p)).sum() for p in rows], atol=1e-6)
    np.testing.assert_allclose(stats.first_mass[0, :, 0], [p[0] for p in rows], rtol=1e-6)
    o, _ = run(mask=Mask(window_size=2))
    np.testing.assert_allclose(o[0, 2, 0, 0], 29 / 7, rtol=1e-6)
    o, stats = run(mask=Mask(), sinks=jnp.log(jnp.asarray([8.0])))
    np.testing.assert_allclose(o[0, 2, 0, 0], 31 / 16, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy[0, 2, 0], -(rows[2] * np.log(rows[2])).sum(), atol=1e-6)
    o, stats = run(mask=Mask(), normalizer="sigmoid", sigmoid_bias=0.0)  # 1/2, 3/4, 4/5
    np.testing.assert_allclose(o[0, 2, 0, 0], 1 + 9 / 4 + 4, rtol=1e-6)
    np.testing.assert_allclose(stats.lse[0, 2, 0], np.log(2.05), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_short_conv_by_hand(implementation: str):
    x, weight = jnp.asarray([[[1.0], [2.0], [4.0]]]), jnp.asarray([[10.0], [1.0]])
    run = cases.quick_jit(partial(kernels.short_conv, activation=None, implementation=implementation))
    y, state = run(x, weight)
    assert y.ravel().tolist() == [1, 12, 24]
    assert state.ravel().tolist() == [4]
    y, state = run(x, weight, at=Tokens(None, jnp.asarray([[1, 2, 0]])))
    assert y.ravel().tolist() == [1, 2, 0]
    assert state.ravel().tolist() == [2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cross_entropy_by_hand(implementation: str):
    hidden, weight = jnp.ones((1, 2, 1)), jnp.log(jnp.asarray([[1.0, 3.0, 4.0]]))
    run = cases.quick_jit(partial(kernels.cross_entropy, implementation=implementation))
    nll, lse = run(hidden, weight, jnp.asarray([[1, -100]]), loss_mask=jnp.asarray([[1, 0]]))
    np.testing.assert_allclose(nll[0], [np.log(8 / 3), 0], rtol=1e-6)
    np.testing.assert_allclose(lse[0], [np.log(8), 0], rtol=1e-6)


def _by_sums(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The decayed attention of one head as a full double sum over tokens, in float64: the T x T form."""
    total = np.cumsum(g, axis=0)
    weights = np.array(
        [[(q[i] * k[j] * np.exp(total[i] - total[j])).sum() if j <= i else 0.0 for j in range(len(q))] for i in range(len(q))]
    )
    return weights @ v


def test_vector_decay_equals_the_double_sum():
    inputs = cases.RECURRENCES["vector_decay"].inputs(20, decay="weak")
    o, _ = cases.jitted("vector_decay", "reference")(inputs, None)
    arrays = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    for b in range(cases.BATCH):
        for h in range(cases.NUM_HEADS):
            expected = _by_sums(arrays["q"][b, :, 0], arrays["k"][b, :, 0], arrays["v"][b, :, h], arrays["g"][b, :, h])
            assert_close(o[b, :, h], expected * cases.KEY_DIM**-0.5)


def test_delta_rule_equals_products_of_transitions():
    inputs = cases.RECURRENCES["kda"].inputs(12)
    o, state = cases.jitted("kda", "reference")(inputs, None)
    q, k, v, g, beta = (np.asarray(inputs[name], np.float64)[0] for name in ("q", "k", "v", "g", "beta"))
    memory = np.zeros((cases.KEY_DIM, cases.VALUE_DIM))
    for t in range(12):
        erase = np.eye(cases.KEY_DIM) - beta[t, 1] * np.outer(k[t, 0], k[t, 0])
        memory = erase @ np.diag(np.exp(g[t, 1])) @ memory + beta[t, 1] * np.outer(k[t, 0], v[t, 1])
        assert_close(o[0, t, 1], memory.T @ q[t, 0] * cases.KEY_DIM**-0.5, err_msg=f"token {t}")
    assert_close(state[0, 1], memory)


def test_attention_equals_jax():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 33, h, 8)), jnp.float32) for h in (4, 2, 2))
    expected = cases.quick_jit(partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
    assert_close(cases.quick_jit(partial(kernels.attention, mask=Mask(), implementation="reference"))(q, k, v), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_soft_cap_and_bias_equal_the_formula(implementation: str):
    rng = np.random.default_rng(0)
    q, k, v, left, right = (rng.standard_normal((2, 20, h, n)) for h, n in ((4, 8), (2, 8), (2, 5), (4, 3), (2, 3)))
    grouped = lambda x: np.repeat(x, 2, axis=2)
    z = np.einsum("bthk,bshk->bhts", q, grouped(k)) / 8**0.5 + np.einsum("bthr,bshr->bhts", left, grouped(right))
    z = np.where(np.tri(20, dtype=bool), 2.5 * np.tanh(z / 2.5), -np.inf)
    weights = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    bias = LowRankBias(*(jnp.asarray(x, jnp.float32) for x in (left, right)))
    options = {"logit_soft_cap": 2.5, "bias": bias, "return_stats": True, "implementation": implementation}
    o, stats = cases.quick_jit(partial(kernels.attention, mask=Mask(), **options))(*arrays)
    assert_close(o, np.einsum("bhts,bshv->bthv", weights, grouped(v)))
    assert_close(stats.max_logit, z.max(-1).swapaxes(1, 2))
    assert_close(stats.lse, np.log(np.exp(z).sum(-1)).swapaxes(1, 2))
    assert_close(stats.first_mass, weights[..., 0].swapaxes(1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_identities_between_recurrences(implementation: str):
    inputs = cases.RECURRENCES["gated_deltanet"].inputs(70, decay="mixed")
    run = {name: cases.jitted(name, implementation, 16) for name in cases.RECURRENCES}
    wide = inputs | {"g": jnp.repeat(inputs["g"][..., None], cases.KEY_DIM, axis=3)}
    plain = {name: x for name, x in inputs.items() if name != "g"}
    still = inputs | {"g": jnp.zeros_like(inputs["g"])}
    pairs = [
        ("KDA with equal channels is Gated DeltaNet", run["kda"](wide, None), run["gated_deltanet"](inputs, None)),
        ("Gated DeltaNet without decay is DeltaNet", run["gated_deltanet"](still, None), run["deltanet"](plain, None)),
        ("vector decay with equal channels is scalar decay", run["vector_decay"](wide, None), run["scalar_decay"](inputs, None)),
    ]
    for what, left, right in pairs:
        assert_close(left[0], right[0], err_msg=what)
        assert_close(left[1], right[1], err_msg=what)
    _, state = run["kda"](wide | {"beta": jnp.zeros_like(inputs["beta"])}, None)
    assert not np.asarray(state).any(), "nothing is written with beta = 0"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deltanet_stores_orthonormal_keys_exactly(implementation: str):
    size = 8
    k = jnp.eye(size)[None, :, None]
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, size, 1, 3)), jnp.float32)
    run = cases.quick_jit(partial(kernels.delta_rule, g=None, implementation=implementation))
    _, state = run(k, k, v, beta=jnp.ones((1, size, 1)))
    assert_close(state[0, 0], v[0, :, 0])


def test_sink_logit_is_a_zero_value_key():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, 1, 4)), jnp.float32) for _ in range(3))
    row_sums = cases.quick_jit(lambda sinks: kernels.attention_rows(q, k, jnp.arange(9), mask=Mask(), sinks=sinks).sum(-1))
    assert (row_sums(jnp.asarray([0.3])) < 1).all()
    assert_close(row_sums(jnp.asarray([-80.0])), jnp.ones((1, 1, 9)))
    zero = jnp.zeros((1, 1, 1, 4))
    shifted = [jnp.concatenate([zero, x], axis=1) for x in (q, k, v)]  # a first key 0 with value 0 has logit 0
    with_key = cases.quick_jit(partial(kernels.attention, mask=Mask()))(*shifted)[:, 1:]
    assert_close(cases.quick_jit(partial(kernels.attention, mask=Mask(), sinks=jnp.zeros(1)))(q, k, v), with_key)


def test_uniform_attention_has_logarithmic_entropy_and_harmonic_sink():
    length = 64
    zeros = jnp.zeros((1, length, 1, 4))
    _, stats = cases.quick_jit(partial(kernels.attention, mask=Mask(), return_stats=True))(zeros, zeros, zeros)
    assert_close(stats.entropy[0, :, 0], np.log(np.arange(1, length + 1)))
    assert_close(stats.first_mass.mean(), (1 / np.arange(1, length + 1)).mean())  # H_64 / 64 = 0.0741


@pytest.mark.parametrize("name", cases.RECURRENCES)
def test_recurrence_gradients_by_finite_differences(name: str):
    """Of the reference; the other implementations are compared with its gradients."""
    with jax.enable_x64(True):
        inputs = {
            key: jnp.asarray(np.asarray(x, np.float64)) for key, x in cases.RECURRENCES[name].inputs(5, decay="weak").items()
        }
        run = jax.jit(lambda x, state: cases.RECURRENCES[name].call(x, initial_state=state, implementation="reference"))
        check_grads(run, (inputs, jnp.ones((2, 2, 8, 4))), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"sinks": True}, {"normalizer": "sigmoid", "sigmoid_bias": -1.0}, {"logit_soft_cap": 0.7}], ids=str
)
def test_attention_gradients_by_finite_differences(options: dict):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        args = *(jnp.asarray(rng.standard_normal((1, 5, h, 3))) for h in (2, 1, 1)), jnp.asarray([0.2, -0.4])
        ids = jnp.asarray([[1, 1, 1, 2, 2]])

        @jax.jit
        def run(q, k, v, sinks):
            o, stats = kernels.attention(
                q, k, v, mask=Mask(window_size=2, num_sink_tokens=1), at=Tokens(None, ids), return_stats=True,
                **(options | ({"sinks": sinks} if options.get("sinks") else {})),
            )  # fmt: skip
            return o, stats.lse, stats.entropy, stats.first_mass

        check_grads(run, args, order=1, modes=["rev"], eps=1e-6)


def test_unit_lower_inverse_is_an_inverse():
    with jax.enable_x64(True):
        lower = jnp.asarray(np.tril(np.random.default_rng(0).standard_normal((2, 16, 16)), -1))
        product = jax.jit(unit_lower_inverse)(lower) @ (jnp.eye(16)[None] + lower)
        assert_close(product, np.broadcast_to(np.eye(16), (2, 16, 16)))
        check_grads(jax.jit(unit_lower_inverse), (lower / 4,), order=1, modes=["rev"], eps=1e-6)


def test_decayed_scores_keep_accuracy_beside_strong_gates():
    """A tiny decay after one of -1000 is not lost in the sum: the reason why no exponent is a difference of sums."""
    g = jnp.full((8, 1), -1e-4).at[2].set(-1000.0)
    ones = jnp.ones((8, 1))
    scores = np.asarray(cases.quick_jit(decayed_scores)(ones, ones, g))
    np.testing.assert_allclose(scores[7, 3], np.exp(-4e-4), rtol=2e-7)
    assert scores[7, 1] == 0

"""Moneta, Yaad and Memora: layers as loops over tokens in float64, three tokens by hand, and what makes each what it is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import online_memory
from plait.kernels.online_memory import Rule
from plait.models.build import BuildContext
from plait.models.mixers.linear.memora import MemoraConfig
from plait.models.mixers.linear.moneta import MonetaConfig
from plait.models.mixers.linear.yaad import YaadConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close

WIDTH, LENGTH = 8, 11
SMALL = {"num_heads": 2, "head_dim": 4, "expand": 2.0, "gate_rank": 3, "conv_size": 2}
MIXERS = {"moneta": MonetaConfig, "yaad": YaadConfig, "memora": MemoraConfig}


def built(name: str, **options):
    module = MIXERS[name](**SMALL, **options).build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] += 0.2 * rng.normal(size=variable.shape).astype(np.float32)
    if name == "yaad":
        module.threshold.bias[...] = jnp.asarray([1.0, 3.0])  # errors on both sides
    return module


erf = np.vectorize(math.erf)
sigmoid = lambda z: 1 / (1 + np.exp(-z))
silu = lambda z: z * sigmoid(z)
softmax = lambda z, axis: np.exp(z - z.max(axis, keepdims=True)) / np.exp(z - z.max(axis, keepdims=True)).sum(axis, keepdims=True)


def gelu(z):
    return 0.5 * z * (1 + erf(z / 2**0.5))


def answer(w, x):
    """`x + norm(gelu(x W_2) W_1)`, and what its gradient needs."""
    z = x @ w[0]
    y = gelu(z) @ w[1]
    centred = y - y.mean()
    size = np.sqrt((centred**2).mean() + 1e-5)
    return x + centred / size, (z, centred / size, size)


WEIGHTS = {
    "moneta": lambda a, opened: [layer / (np.abs(old) ** 4).sum() ** 0.5 for layer, old in zip(a, opened)],
    "yaad": lambda a, opened: a,
    "memora": lambda a, opened: [softmax(a[0], 1), softmax(a[1], 0)],
}


def gradient(w, k, pulled):
    """By the chain rule, from the gradient in the answer to k."""
    _, (z, normed, size) = answer(w, k)
    d = (pulled - pulled.mean() - normed * (pulled * normed).mean()) / size
    inner = (w[1] @ d) * (0.5 * (1 + erf(z / 2**0.5)) + z * np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5)
    return [np.outer(k, inner), np.outer(gelu(z), d)]


def by_loops(name: str, m, x: np.ndarray, chunk: int) -> np.ndarray:
    """The layer of one document `[T, D]`, one token after the other; `m` holds its parameters by path."""
    heads, dim = 2, 4

    def stream(which):
        y = x @ m[f"{which}.kernel"]
        before = np.vstack([np.zeros((1, heads * dim)), y[:-1]])
        return silu(before * m[f"{which}_conv.weight"][0] + y * m[f"{which}_conv.weight"][1]).reshape(-1, heads, dim)

    q, k, v = map(stream, "qkv")
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    gate = lambda which: (x @ m[f"{which}.down.kernel"] @ m[f"{which}.up.kernel"] + m[f"{which}.bias"]).reshape(-1, heads, dim)
    alpha, eta = sigmoid(gate("retention")), sigmoid(gate("learning"))
    o = np.zeros_like(v)
    for h in range(heads):
        a = [m[f"initial.{layer}"][h] for layer in range(2)]
        for t in range(len(x)):
            if t % chunk == 0:
                opened = a
            weights = functools.partial(WEIGHTS[name], opened=opened)
            e = answer(weights(opened), k[t, h])[0] - v[t, h]
            if name == "moneta":
                pulled = 3 * np.tanh(10 * e) * (e**2 + 1e-6)
            elif name == "yaad":
                delta = np.log1p(np.exp(x[t] @ m["threshold.up.kernel"] + m["threshold.bias"]))[h]
                pulled = 2 * e if np.linalg.norm(e) <= delta else delta * np.tanh(10 * e)
            else:
                pulled = 2 * e
            u = gradient(weights(opened), k[t, h], pulled)
            row, column = (alpha[t, h][:, None], eta[t, h][:, None]), (alpha[t, h][None], eta[t, h][None])
            a = [kept * old - step * new for (kept, step), old, new in zip((row, column), a, u)]
            o[t, h] = answer(weights(a), q[t, h])[0]
    normed = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * m["norm.scale"]
    return (normed * silu(x @ m["gate.kernel"]).reshape(o.shape)).reshape(len(x), -1) @ m["o.kernel"]


@pytest.mark.proves("moneta", "yaad", "memora")
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_layer_in_numpy(name, chunk):
    graph, state = nnx.split(built(name, chunk_size=chunk))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, LENGTH, WIDTH)), jnp.float32)
    at = layout((LENGTH,), length=LENGTH)
    got = quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=at, carry={}).y)(state, x)
    named = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(state)}
    assert_close(got[0], by_loops(name, named, np.asarray(x[0], np.float64), chunk), dtype="float32")


def one_layer(name: str, rule: Rule, initial, **gates):
    """Three tokens of a memory of one channel and no residual: k = q = 1."""
    row = lambda *numbers: jnp.asarray(numbers, jnp.float32).reshape(1, 3, 1)
    named = {key: row(*numbers) for key, numbers in gates.items()}
    v, ones = named.pop("v")[..., None], jnp.ones((1, 3, 1, 1))
    o, *_ = online_memory(ones, ones, v, initial=tuple(jnp.asarray(w, jnp.float32) for w in initial), rule=rule, **named)
    return np.asarray(o)[0, :, 0, 0]


@pytest.mark.proves("moneta")
def test_moneta_three_tokens_by_hand():
    """One weight, so that `W = A / |A|^2 = 1 / A`; the gradient of |W - v|^3 is `3 sign |W - v|^2` where the error is not small."""
    rule = Rule(p=3.0, retention="lq", q=4.0, chunk_size=1)
    got = one_layer("moneta", rule, [[[[0.5]]]], g=np.log([0.5, 1.0, 0.5]), step=[0.25, 0.5, 1.0], v=[1.0, 0.0, -1.0])
    # A: 0.5 -> W 2; 0.25 - 0.25 * 3 = -0.5; W -2: -0.5 + 0.5 * 12 = 5.5; W 2/11: 2.75 - 3 (13/11)^2. A token reads with the
    # norm at the start of its chunk: -0.5 / 0.25, 5.5 / 0.25 and the last over 5.5^2.
    last = 2.75 - 3 * (13 / 11) ** 2
    np.testing.assert_allclose(got, [-2.0, 22.0, last / 5.5**2], rtol=1e-4)


@pytest.mark.proves("yaad")
def test_yaad_three_tokens_by_hand():
    """The same without a norm: the first error is within its threshold, the second and third are not."""
    rule = Rule(bias="huber", chunk_size=1)
    gates = {"g": np.log([0.5, 1.0, 0.5]), "step": [0.25, 0.5, 1.0], "v": [1.0, 3.0, -2.0], "threshold": [2.0, 1.0, 0.5]}
    # W: 2; 1 - 0.25 * 2 * 1 = 0.5; 0.5 + 0.5 * 1 * 1 = 1; 0.5 - 0.5 * 1 = 0
    np.testing.assert_allclose(one_layer("yaad", rule, [[[[2.0]]]], **gates), [0.5, 1.0, 0.0], atol=1e-6)


@pytest.mark.proves("memora")
def test_memora_three_tokens_by_hand():
    """One channel and two units with the shares s and r: `M(1) = r_1 gelu(s_1) + r_2 gelu(s_2)`."""
    rule = Rule(retention="kl", chunk_size=1)
    kept, step, v = [0.5, 1.0, 0.5], [0.25, 0.5, 1.0], [1.0, 0.0, -1.0]
    got = one_layer("memora", rule, [np.log([[[3.0, 1.0]]]), np.log([[[1.0], [4.0]]])], g=np.log(kept), step=step, v=v)
    s, r, expected = np.array([0.75, 0.25]), np.array([0.2, 0.8]), []
    for a, b, target in zip(kept, step, v):
        error = 2 * ((r * gelu(s)).sum() - target)
        of_s = error * r * (0.5 * (1 + erf(s / 2**0.5)) + s * np.exp(-(s**2) / 2) / (2 * np.pi) ** 0.5)
        of_r = error * gelu(s)
        s, r = softmax(a * np.log(s) - b * of_s, 0), softmax(a * np.log(r) - b * of_r, 0)
        expected.append((r * gelu(s)).sum())
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_memora_keeps_shares():
    module = built("memora", chunk_size=4)
    x = jax.random.normal(jax.random.key(0), (1, LENGTH, WIDTH))
    _, _, state = module.prefill(x, module.init_state(1, LENGTH), at=layout((LENGTH,), length=LENGTH), carry={})
    w = module.rule.weights(state.memory.accumulated, state.memory.opened)
    np.testing.assert_allclose(w[0].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(w[1].sum(-2), 1, rtol=1e-5)
    assert all((layer >= 0).all() for layer in w)


def test_monetas_exponent_of_two_leaves_the_weights_as_they_are():
    a = (jnp.full((1, 1, 2, 3), 0.5), jnp.full((1, 1, 3, 2), 2.0))
    same, changed = (Rule(retention="lq", q=q).weights(a, a) for q in (2.0, 4.0))
    jax.tree.map(np.testing.assert_array_equal, same, a)
    assert_close(changed[0], a[0] / (6 * 0.5**4) ** 0.5)

"""Titans: layers as loops over tokens in float64, borders of chunks, and what holds the memory to the equations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.linear.titans_mac import TitansMACConfig
from plait.models.mixers.linear.titans_mag import TitansMAGConfig
from plait.models.mixers.linear.titans_mal import TitansMALConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, HEADS, DIM, WINDOW = 8, 11, 2, 4, 3
SMALL = {"num_heads": HEADS, "head_dim": DIM, "expand": 1.5, "conv_size": 2, "num_persistent": 2}
MIXERS = {"titans_mag": TitansMAGConfig, "titans_mal": TitansMALConfig, "titans_mac": TitansMACConfig}
AT = layout((LENGTH,), length=LENGTH)


def built(name: str, **options):
    window = {} if name == "titans_mac" else {"window_size": WINDOW}
    config = MIXERS[name](**SMALL, **window, **options)
    module = config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] += 0.2 * rng.normal(size=variable.shape).astype(np.float32)
    return nnx.split(module)


def inputs(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, LENGTH, WIDTH)), jnp.float32)


def run(graph):
    return quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).y)


erf = np.vectorize(math.erf)
sigmoid = lambda z: 1 / (1 + np.exp(-z))
gelu = lambda z: 0.5 * z * (1 + erf(z / 2**0.5))
silu = lambda z: z * sigmoid(z)
heads = lambda y: y.reshape(*y.shape[:-1], HEADS, DIM)


def rms(y, scale):
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x, position):
    """A head rotated by a position."""
    angle = position * 1e4 ** (-np.arange(DIM // 2) / (DIM // 2))
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


class Memory:
    """The neural memory of one head, which the tokens of a document are given to one by one."""

    def __init__(self, weights, chunk: int):
        self.w, self.s, self.chunk, self.count = weights, [np.zeros_like(w) for w in weights], chunk, 0

    def read(self, q, weights=None):
        weights = self.w if weights is None else weights
        return gelu(q @ weights[0]) @ weights[1]

    def learn(self, k, v, alpha, eta, theta):
        if self.count % self.chunk == 0:
            self.opened = self.w
        z = k @ self.opened[0]
        e = 2 * (self.read(k, self.opened) - v)
        inner = (self.opened[1] @ e) * (0.5 * (1 + erf(z / 2**0.5)) + z * np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5)
        u = [np.outer(k, inner), np.outer(gelu(z), e)]
        self.s = [eta * old - theta * new for old, new in zip(self.s, u)]
        self.w = [(1 - alpha) * old + new for old, new in zip(self.w, self.s)]
        self.count += 1


class Loops:
    """The parts of a layer, of its parameters by path."""

    def __init__(self, state, chunk: int):
        self.m = {".".join(map(str, path)): np.asarray(p[...], np.float64) for path, p in nnx.to_flat_state(state)}
        self.chunk = chunk
        weights = [self.m[f"memory.initial.{layer}"] for layer in range(2)]
        self.memories = [Memory([w[h] for w in weights], chunk) for h in range(HEADS)]

    def stream(self, x, which):
        """q, k or v of the memory at the last of the tokens x `[t, D]`."""
        y, taps = x[-2:] @ self.m[f"memory.{which}.kernel"], self.m[f"memory.{which}_conv.weight"]
        y = heads(silu(y[-1] * taps[1] + (y[0] * taps[0] if len(y) == 2 else 0)))
        return y if which == "v" else y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)

    def remember(self, x):
        """What the memory gives to the last of the tokens x, having learned it."""
        q, k, v = (self.stream(x, which) for which in "qkv")
        gate = lambda name: sigmoid(x[-1] @ self.m[f"memory.{name}.up.kernel"] + self.m[f"memory.{name}.bias"])
        alpha, eta, theta = gate("forget"), gate("surprise"), gate("learning")
        theta = theta * (1 - eta) / self.chunk
        for h, memory in enumerate(self.memories):
            memory.learn(k[h], v[h], alpha[h], eta[h], theta[h])
        return np.concatenate([memory.read(q[h]) for h, memory in enumerate(self.memories)])

    def attend(self, prefix, x, position, tokens):
        """Attention of x to the persistent tokens and to `(position, token)` pairs."""
        w = lambda name: self.m[f"{prefix}{name}.kernel"]
        q, persistent = heads(x @ w("q")), self.m[f"{prefix}persistent"]
        keys, values = [heads(p @ w("k")) for p in persistent], [heads(p @ w("v")) for p in persistent]
        logits = [(q * k).sum(-1) for k in keys]
        for at, token in tokens:
            logits.append((turned(q, position) * turned(heads(token @ w("k")), at)).sum(-1))
            values.append(heads(token @ w("v")))
        weights = np.exp(np.array(logits) / DIM**0.5)
        return ((weights / weights.sum(0))[..., None] * np.array(values)).sum(0).reshape(-1)

    def joined(self, y, memory):
        """The memory as a gate, and the projection."""
        normed = rms(y, self.m["join.y_norm.scale"]) * sigmoid(rms(memory, self.m["join.memory_norm.scale"]))
        return normed @ self.m["join.o.kernel"]


def mag(loops: Loops, x, chunk):
    window = lambda t: [(j, x[j]) for j in range(max(0, t - WINDOW + 1), t + 1)]
    return [loops.joined(loops.attend("attention.", x[t], t, window(t)), loops.remember(x[: t + 1])) for t in range(len(x))]


def mal(loops: Loops, x, chunk):
    m, ys = loops.m, []
    for t in range(len(x)):
        read = rms(heads(loops.remember(x[: t + 1])), m["memory.norm.scale"]).reshape(-1)
        ys.append((read * silu(x[t] @ m["memory.gate.kernel"])) @ m["memory.o.kernel"])
    window = lambda t: [(j, ys[j]) for j in range(max(0, t - WINDOW + 1), t + 1)]
    return [loops.attend("attention.", ys[t], t, window(t)) @ m["o.kernel"] for t in range(len(x))]


def mac(loops: Loops, x, chunk):
    ys, reads, outputs = [], [], []
    for t in range(len(x)):
        if t % chunk == 0:
            start, before = t, [memory.w for memory in loops.memories]
        q = loops.stream(x[: t + 1], "q")
        reads.append(np.concatenate([memory.read(q[h], before[h]) for h, memory in enumerate(loops.memories)]))
        seen = [(j, token) for j in range(start, t + 1) for token in (x[j], reads[j])]
        ys.append(loops.attend("", x[t], t, seen))
        outputs.append(loops.joined(ys[-1], loops.remember(np.array(ys))))
    return outputs


@pytest.mark.proves("titans_mag", "titans_mal", "titans_mac")
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_layer_in_numpy(name, chunk):
    graph, state = built(name, chunk_size=chunk)
    x = inputs()
    by_loops = {"titans_mag": mag, "titans_mal": mal, "titans_mac": mac}[name]
    expected = by_loops(Loops(state, chunk), np.asarray(x[0], np.float64), chunk)
    assert_close(run(graph)(state, x)[0], np.array(expected), dtype="float32")


@pytest.mark.parametrize("name", usually(MIXERS, "titans_mal"))
def test_second_order_gradients_flow(name):
    """The derivative in the input is that of the numbers, through the gradients that the memory learns by."""
    graph, state = built(name, chunk_size=4)
    x, direction = inputs(1), inputs(2)
    size = lambda x: jnp.square(nnx.merge(graph, state)(x, at=AT, carry={}).y).sum()
    loops = {"titans_mag": mag, "titans_mal": mal, "titans_mac": mac}[name]

    def in_numpy(step: float) -> float:
        moved = np.asarray(x[0], np.float64) + step * np.asarray(direction[0], np.float64)
        return float(np.square(loops(Loops(state, 4), moved, 4)).sum())

    expected = (in_numpy(1e-5) - in_numpy(-1e-5)) / 2e-5
    parts = np.asarray(quick_jit(jax.grad(size))(x) * direction, np.float64)
    assert abs(parts.sum() - expected) < 1e-4 * np.abs(parts).sum()


def test_reads_of_later_tokens_are_not_seen():
    """All reads of a segment beside its tokens, as memory as a context is drawn, would tell a token of later ones."""
    graph, state = built("titans_mac", chunk_size=8)
    x = inputs()
    whole, cut = run(graph)(state, x), run(graph)(state, x.at[:, 5:].set(3.0))
    np.testing.assert_array_equal(whole[:, :5], cut[:, :5])
    assert (np.asarray(whole[:, 5:]) != np.asarray(cut[:, 5:])).all()


def test_persistent_tokens_are_seen_by_every_query():
    graph, state = built("titans_mag", chunk_size=4)
    moved = jax.tree.map(lambda a: a, state)
    moved["attention"]["persistent"][...] = moved["attention"]["persistent"][...] + 1.0
    x = inputs()
    assert (np.asarray(run(graph)(state, x)) != np.asarray(run(graph)(moved, x))).any(-1).all()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("ids", [1, 8])
def test_memories_stay_where_keys_repeat(depth, ids):
    """At its defaults, over several chunks: nothing that is read is much larger than the values."""
    mixer = TitansMAGConfig(head_dim=24, memory_depth=depth).build(48, BuildContext(rngs=nnx.Rngs(0), seq_len=512))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ids, 48))[rng.integers(0, ids, 512)][None], jnp.float32)

    def read(x):
        memory, at = mixer.memory, Tokens().placed(1, 512)
        inputs, _ = memory.project(x, at=at, state=None)
        return memory.attend(inputs, at=at, state=None)[0], inputs.v

    o, v = quick_jit(read)(x)
    assert jnp.abs(o).max() < 2 * jnp.abs(v).max()


def test_memories_are_counted_by_layer_and_head():
    config = TitansMAGConfig(**SMALL)
    widths = [DIM, 6, DIM]
    assert config.widths == tuple(widths)
    state = 3 * 4 * HEADS * sum(a * b for a, b in itertools.pairwise(widths))  # accumulated, momentum, open chunk; float32
    cache, convs = (config.window_size * (2 * WIDTH + 1) * 4), 3 * WIDTH * 4
    assert config.state_bytes(WIDTH, 10_000, "float32") == state + cache + convs + 4
    assert config.state_bytes(WIDTH, 1_000_000, "float32") == config.state_bytes(WIDTH, 10_000, "float32")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TitansMAGConfig(head_dim=5), "head_dim=5 must be even"),
        (lambda: TitansMACConfig(num_heads=1, head_dim=4).fit(WIDTH), "num_heads=1 times head_dim=4 must be d_model=8"),
        (lambda: TitansMALConfig(memory_depth=0), "memory_depth=0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Sparse attention that chooses, against the authors' naive forms, against the papers read in NumPy, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens, whole_blocks
from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.sparse.dma import DMAConfig, DMAInputs
from plait.models.mixers.sparse.hcam import HCAMConfig
from plait.models.mixers.sparse.landmark import LandmarkConfig
from plait.models.mixers.sparse.moba import MoBAConfig
from plait.models.mixers.sparse.nsa import KV, NSAConfig, NSAInputs
from plait.models.mixers.sparse.selecting import Selectable
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate_sparse import BLOCK, DIM, DOCUMENTS, HEADS, KEPT, KV_HEADS, TOP_K, WINDOW, Arrays
from plait.tests.models.mixers.full import test_weights_oracles as layers
from plait.tests.models.mixers.full.test_weights_oracles import golden_arrays
from plait.tests.models.test_oracles import filled
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, in_float64

SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "block_size": BLOCK, "top_k": TOP_K}
AT = layout(DOCUMENTS, length=sum(DOCUMENTS))
WIDTH, LENGTH = 16, 27


def build(config: MixerConfig, width: int = WIDTH, dtype: str = "float32") -> nnx.Module:
    return config.build(width, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, compute_dtype=jnp.dtype(dtype)))


def assert_golden(arrays: Arrays, heads) -> None:
    """Head outputs of the inputs by name, and their gradients."""
    leaves = {name: arrays[name] for name in arrays if f"gradient/{name}" in arrays}
    o, pull = quick_jit(lambda leaves: jax.vjp(lambda leaves: heads(**leaves), leaves))(leaves)
    assert_close(o, arrays["output"])
    for name, gradient in pull(jnp.asarray(arrays["cotangent"]))[0].items():
        assert_close(gradient, arrays[f"gradient/{name}"], err_msg=name)


@pytest.mark.proves("moba")
def test_moba_is_the_authors_naive_form():
    mixer = build(MoBAConfig(**SIZES))
    assert_golden(golden_arrays("moba"), lambda q, k, v: mixer.attend(Selectable(q, k, v), at=AT, state=None)[0])


@pytest.mark.proves("nsa")
def test_nsa_is_flas_naive_form():
    """Whose simplification the options are."""
    simple = {"span": BLOCK, "stride": BLOCK, "num_first": 0, "num_local": 1, "window_size": WINDOW}
    mixer = build(NSAConfig(**SIZES, **simple, compression="mean", keys="shared"))

    def heads(q, k, v, g_cmp, g_slc, g_swa):
        runs, kv = whole_blocks(AT, BLOCK), KV(k, v)
        at = Tokens(None, runs.at.segment_ids, (runs.at.positions + 1) * BLOCK - 1)
        compressed = KV(runs.mean(k), runs.mean(v), at)
        inputs = NSAInputs(q, kv, kv, kv, compressed, jnp.stack([g_cmp, g_slc, g_swa], -1))
        return mixer.attend(inputs, at=AT, state=None)[0]

    assert_golden(golden_arrays("nsa"), heads)


@pytest.mark.proves("dma")
def test_dma_is_doges_layer():
    arrays = golden_arrays("dma")
    w = lambda name: arrays[f"weights/{name}"]
    weights = {f"{name}.kernel": w(f"{name}_proj.weight").T for name in "qkvo"} | {"d.kernel": w("dt_proj.weight").T, "a": w("A")}
    weights |= {f"{name}_norm.scale": w(f"{name}_norm.weight") for name in "qk"}
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": layers.WIDTH // HEADS}
    layer = filled(build(DMAConfig(**sizes, top_k=KEPT, bias="exp"), layers.WIDTH), weights)
    layers.assert_golden(layer, lambda layer, x: layer(x, at=layers.AT, carry={}).y, arrays)


def test_dma_of_tokens_that_count_alike_sees_the_last_and_of_few_all():
    """As a window, and as softmax attention, at the start of training."""
    dma = lambda top_k: build(DMAConfig(num_heads=2, head_dim=8, top_k=top_k))
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    at = layout((LENGTH,), length=LENGTH)
    near = (np.tri(LENGTH) - np.tri(LENGTH, k=-5) > 0)[None, None]
    assert (np.asarray(dma(5).implied_attention(x, at=at) > 0) == near).all()
    assert (np.asarray(dma(LENGTH).implied_attention(x, at=at) > 0) == (np.tri(LENGTH) > 0)[None, None]).all()


@pytest.mark.parametrize("make", usually([MoBAConfig, NSAConfig], MoBAConfig), ids=["moba", "nsa"])
def test_rows_shorter_than_a_block_are_whole(make):
    """Of what is not yet compressed or chosen there is nothing."""
    mixer = build(make(num_heads=2, head_dim=8))
    y = mixer(jnp.ones((1, 7, WIDTH)), at=layout((7,), length=7), carry={}).y
    assert np.isfinite(y).all() and np.abs(y).max() > 0


def softmax_rows(z: np.ndarray, seen: np.ndarray) -> np.ndarray:
    z = np.where(seen, z, -1e30)
    e = np.where(seen, np.exp(z - z.max(-1, initial=-1e30, keepdims=True)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def nsa_in_numpy(config: NSAConfig, weights: Arrays, x: np.ndarray) -> np.ndarray:
    """The paper's equations 5 to 12 for one document `[T, D]`, NoPE; runs and blocks counted from 1, as there."""
    w = lambda name: np.asarray(weights[name], np.float64)
    split = lambda name, y=x: (y @ w(f"{name}.kernel")).reshape(len(x), -1, config.head_dim)
    group = config.num_heads // config.num_kv_heads
    q, t = split("q"), np.arange(len(x))[:, None]
    pairs = {name: [np.repeat(split(f"{name}.{i}"), group, 1) for i in range(2)] for name in ("kv", "window_kv", "compressed_kv")}
    starts = np.arange(0, len(x) - config.span + 1, config.stride)

    def phi(y: np.ndarray, i: int) -> np.ndarray:
        runs = np.stack([y[s : s + config.span] for s in starts]) + w(f"networks.{i}.places")[None, :, None]
        flat = runs.transpose(0, 2, 1, 3).reshape(len(starts), y.shape[1], -1)
        hidden = flat @ w(f"networks.{i}.hidden.kernel") + w(f"networks.{i}.hidden.bias")
        return (hidden / (1 + np.exp(-hidden))) @ w(f"networks.{i}.out.kernel")

    def branch(k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = softmax_rows(np.einsum("thk,shk->hts", q, k) * config.head_dim**-0.5, seen)
        return p, np.einsum("hts,shv->thv", p, v)

    k, v = (phi(y, i) for i, y in enumerate(pairs["compressed_kv"]))
    p, compressed = branch(k, v, (starts + config.span - 1)[None] <= t)
    blocks, r, c = -(-len(x) // config.block_size), config.block_size // config.stride, config.span // config.stride
    scores = np.zeros((config.num_kv_heads, len(x), blocks))
    for j in range(1, blocks + 1):
        for m in range(r):
            for n in range(c):
                if 1 <= (i := r * j - m - n) <= len(starts):  # equation 9
                    scores[:, :, j - 1] += p[:, :, i - 1].reshape(-1, group, len(x)).sum(1)  # equation 10
    chosen = np.zeros((config.num_heads, len(x), len(x)), bool)
    for head in range(config.num_heads):
        for i in range(len(x)):
            own = i // config.block_size
            forced = [n for n in range(own + 1) if n < config.num_first or n > own - config.num_local]
            free = sorted((n for n in range(own) if n not in forced), key=lambda n: -scores[head // group, i, n])
            for n in [*forced, *free[: config.top_k - len(forced)]]:
                chosen[head, i, n * config.block_size : (n + 1) * config.block_size] = True
    causal = t >= t.T
    selected = branch(*pairs["kv"], chosen & causal)[1]
    window = branch(*pairs["window_kv"], causal & (t - config.window_size < t.T))[1]
    gates = 1 / (1 + np.exp(-(x @ w("gate.kernel")).reshape(len(x), config.num_heads, 3, 1)))
    o = gates[:, :, 0] * compressed + gates[:, :, 1] * selected + gates[:, :, 2] * window
    return o.reshape(len(x), -1) @ w("o.kernel")


@pytest.mark.proves("nsa")
def test_nsa_is_the_papers_equations():
    """With overlapping runs under the blocks, a network, and keys of each branch's own; in float64."""
    config = NSAConfig(
        **{**SIZES, "top_k": 4, "block_size": 4}, positions=None, span=4, stride=2, num_first=1, num_local=2, window_size=5
    )
    graph, state = nnx.split(build(config, dtype="float64"))
    x = np.random.default_rng(3).normal(size=(1, LENGTH, WIDTH))

    def run(state, x):
        return nnx.merge(graph, state)(x, at=layout((LENGTH,), length=LENGTH), carry={}).y

    weights = {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}
    assert_close(
        in_float64(run, state, jnp.asarray(x, jnp.float32))[0], nsa_in_numpy(config, weights, np.float32(x[0]).astype(np.float64))
    )


def layer(config: MixerConfig):
    """The layer's output as a function of its parameters, and those. NoPE: angles are in float32."""
    graph, state = nnx.split(build(config, 64, dtype="float64"))
    x = np.random.default_rng(4).normal(size=(1, LENGTH, 64))
    return lambda state: nnx.merge(graph, state)(jnp.asarray(x), at=layout((LENGTH,), length=LENGTH), carry={}).y, state


def dma_heads():
    """Head outputs as a function of what the layer, whose norms are in float32, gives to them."""
    mixer, random = build(DMAConfig.example(), 64, dtype="float64"), np.random.default_rng(5)
    given = [jnp.asarray(random.normal(size=(1, LENGTH, *rest)), jnp.float32) for rest in ((4, 16), (2, 16), (2, 16), (2,))]
    return lambda given: mixer.attend(DMAInputs(*given), at=layout((LENGTH,), length=LENGTH), state=None)[0], given


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer(dataclasses.replace(MoBAConfig.example(), positions=None)),
        lambda: layer(dataclasses.replace(NSAConfig.example(), positions=None)),
        dma_heads,
        lambda: layer(dataclasses.replace(HCAMConfig.example(), positions=None)),
        lambda: layer(dataclasses.replace(LandmarkConfig.example(), positions=None)),
    ],
    ids=["moba", "nsa", "dma", "hcam", "landmark"],
)
def test_gradients_are_finite_differences(make):
    """In float64, in everything at once; of what chooses too, which learns by what it attends to."""
    function, start = make()

    def slopes(start):
        way = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), start)
        value = lambda by: jnp.sin(function(jax.tree.map(lambda a, b: a + by * b, start, way))).sum()
        step = 1e-6
        return jax.grad(value)(0.0), (value(step) - value(-step)) / (2 * step)

    exact, found = in_float64(quick_jit(slopes), start)
    assert abs(found / exact - 1) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NSAConfig(stride=24), "stride=24 must divide span=32 and block_size=64; use 32 or a divisor"),
        (lambda: NSAConfig(block_size=24), "stride=16 must divide span=32 and block_size=24; use 8 or a divisor"),
        (lambda: NSAConfig(top_k=2), "top_k=2 must hold num_first=1 and num_local=2; use at least 3"),
        (lambda: NSAConfig(compression="mean", hidden_dim=8), "hidden_dim=8 is of compression='mlp'"),
        (lambda: MoBAConfig(top_k=0), "top_k=0 must be a whole number from 1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

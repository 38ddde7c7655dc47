"""Attention with other queries, keys, values and combinations, against code that is not ours: committed numbers, and live where it is."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.diff import DiffConfig
from plait.models.mixers.full.diff_v2 import DiffV2Config
from plait.models.mixers.full.dual_attention import DualAttentionConfig
from plait.models.mixers.full.kdgqa import KDGQAConfig
from plait.models.mixers.full.mdha import MDHAConfig
from plait.models.mixers.full.rcmha import RCMHAConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_variants
from plait.tests.models.golden.generate_variants import BATCH, LAYER, LENGTH, WIDTH, Arrays
from plait.tests.models.test_oracles import filled
from plait.tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[2] / "golden"
AT = layout(*[(LENGTH,)] * BATCH, length=LENGTH)


def build(config: MixerConfig, weights: Arrays, causal: bool = True) -> nnx.Module:
    ctx = BuildContext(layer_index=LAYER, num_layers=4, rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal)
    return filled(config.build(WIDTH, ctx), weights)


def run(layer: nnx.Module, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The output, and the gradient of its product with the cotangent in x."""
    graph, state = nnx.split(layer)

    @quick_jit
    def both(state, x, cotangent):
        y, pull = jax.vjp(lambda x: nnx.merge(graph, state)(x, at=AT, carry={}).y, x)
        return y, pull(cotangent)[0]

    return both(state, arrays["x"], arrays["cotangent"])


def diff(arrays: Arrays) -> nnx.Module:
    """The layer there has the first maps of all heads before the second ones, and no gain in the norm."""
    w = lambda name: arrays[f"weights/{name}"]
    first_and_second = w("q_proj.weight").reshape(2, 2, 4, WIDTH).swapaxes(0, 1).reshape(-1, WIDTH)
    weights = {
        "q.kernel": first_and_second.T,
        **{f"{n}.kernel": w(f"{n}_proj.weight").T for n in "kvo"},
        "vectors": np.stack([[w(f"lambda_{n}{i}") for n in "qk"] for i in (1, 2)]),
        "start": np.float32(0.8 - 0.6 * np.exp(-0.3 * LAYER)),
        "norm.scale": np.ones(8, np.float32),
    }
    return build(DiffConfig(num_heads=2, num_kv_heads=1, head_dim=4), weights)


def diff_v2(arrays: Arrays) -> nnx.Module:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "weight": "lambda_proj"}
    weights = {f"{ours}.kernel": arrays[f"weights/{theirs}.weight"].T for ours, theirs in names.items()}
    return build(DiffV2Config(num_heads=4, num_kv_heads=2, head_dim=4, positions=None), weights)


def _convolved(arrays: Arrays) -> Arrays:
    weights = {f"{n}.kernel": arrays[f"weights/{n}"] for n in "qkvo"}
    return weights | {f"{n}_conv.weight": arrays[f"weights/{n}_conv"] for n in "qkv"}


def mdha(arrays: Arrays) -> nnx.Module:
    return build(MDHAConfig(num_heads=4, head_dim=4, positions=None), _convolved(arrays))


def rcmha(arrays: Arrays) -> nnx.Module:
    weights = _convolved(arrays) | {"r.kernel": arrays["weights/r"]} | {n: arrays[f"weights/{n}"] for n in "uw"}
    return build(RCMHAConfig(num_heads=4, head_dim=4), weights)


def dual_attention(arrays: Arrays) -> nnx.Module:
    kernel = lambda name: arrays[f"weights/{name}.weight"].T
    weights = {f"{n}.kernel": kernel(f"layer.self_attention.w{n}") for n in "qkvo"}
    relational = {"r_q": "wq_attn", "r_k": "wk_attn", "r_v": "wv", "r_o": "wo", "relating": "wq_rel", "related": "wk_rel"}
    weights |= {f"{ours}.kernel": kernel(f"layer.relational_attention.{theirs}") for ours, theirs in relational.items()}
    weights |= {
        "of_relations.kernel": arrays["weights/layer.relational_attention.wr"].swapaxes(1, 2),
        "symbol_query.kernel": kernel("symbols.q_proj"),
        "symbol_query.bias": arrays["weights/symbols.q_proj.bias"],
        "templates": arrays["weights/symbols.template_features"],
        "library": arrays["weights/symbols.symbol_library"],
    }
    config = DualAttentionConfig(num_heads=4, num_kv_heads=1, num_relations=4, num_symbols=5, symbol_heads=2, positions=None)
    return build(config, weights)


def kdgqa(arrays: Arrays) -> nnx.Module:
    """The layer there sizes its groups by the batch at hand; ours by the same batch, seen before."""
    names = {"q": "q", "k": "k", "v": "v", "o": "proj"}
    weights = {f"{ours}.kernel": arrays[f"weights/{theirs}.weight"].T for ours, theirs in names.items()}
    weights |= {"sizes": np.full(4, 2, np.int32), "before": np.zeros(4, np.float32), "steps": np.int32(0)}
    layer = build(KDGQAConfig(num_heads=8, num_kv_heads=4, head_dim=2, positions=None), weights, causal=False)
    x = jnp.asarray(arrays["x"])
    layer.settle(layer.counts(layer.project(x, at=AT, state=None)[0], x, at=AT))
    assert len(set(np.asarray(layer.sizes[...]).tolist())) > 1
    return layer


OURS = {f.__name__: f for f in (diff, diff_v2, mdha, rcmha, dual_attention, kdgqa)}


@pytest.mark.proves("diff", "diff_v2", "mdha", "rcmha", "dual_attention", "kdgqa")
@pytest.mark.parametrize("name", generate_variants.ORACLES)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = dict(golden)
    y, x_grad = run(OURS[name](arrays), arrays)
    assert_close(y, arrays["output"])
    assert_close(x_grad, arrays["x_grad"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the oracle packages torch and transformers",
)
@pytest.mark.parametrize("name", generate_variants.LIVE)
def test_live(name):
    arrays = generate_variants.LIVE[name](seed=7)
    assert_close(run(OURS[name](arrays), arrays)[0], arrays["output"])

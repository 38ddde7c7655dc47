"""Attention whose weights are not softmax's, against the authors' layers: committed golden numbers, outputs and gradients."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.channel_mixers.gaam import GAAMConfig
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.cog import CogConfig
from plait.models.mixers.full.mta import MTAConfig
from plait.models.mixers.full.neural_attention import NeuralAttentionConfig
from plait.tests.models import golden
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden.generate_weights import BATCH, HEADS, LENGTH, WIDTH, Arrays
from plait.tests.models.test_oracles import filled
from plait.tests.tolerances import assert_close

HEAD_DIM = WIDTH // HEADS
AT = layout(*[(LENGTH,)] * BATCH, length=LENGTH)
Found = tuple[MixerConfig, Arrays]


def cog(arrays: Arrays) -> Found:
    """The layer there pairs neighbouring channels in its rotary embedding."""
    halves = np.r_[0:HEAD_DIM:2, 1:HEAD_DIM:2]
    paired = lambda w: w.reshape(WIDTH, HEADS, HEAD_DIM)[..., halves].reshape(WIDTH, -1)
    q, k, v, o = (arrays[f"weights/{name}w"] for name in "qkvo")
    weights = {"q.kernel": paired(q), "k.kernel": paired(k), "v.kernel": v, "o.kernel": o}
    return CogConfig(num_heads=HEADS, head_dim=HEAD_DIM), weights


def neural_attention(arrays: Arrays) -> Found:
    """The layer there fuses q, k and v behind the channel of a head, and the first hidden layer's halves."""
    w = lambda name: arrays[f"weights/{name}"]
    fused = w("to_qkv.weight").reshape(HEAD_DIM, 3, HEADS, WIDTH).transpose(1, 3, 2, 0).reshape(3, WIDTH, -1)
    hidden = w("linear1.weight")
    weights = {f"{name}.kernel": kernel for name, kernel in zip("qkv", fused, strict=True)}
    weights |= {"o.kernel": w("W_out.weight").T, "q_hidden.bias": w("linear1.bias")}
    weights |= {"q_hidden.kernel": hidden[:, :6].T, "k_hidden.kernel": hidden[:, 6:].T}
    for ours, theirs in (("q_down", "q_proj"), ("k_down", "k_proj"), ("second", "linear2"), ("third", "linear3")):
        weights |= {f"{ours}.kernel": w(f"{theirs}.weight").T, f"{ours}.bias": w(f"{theirs}.bias")}
    return NeuralAttentionConfig(num_heads=HEADS, head_dim=HEAD_DIM, pair_dim=6), weights


def mta(arrays: Arrays) -> Found:
    w = lambda name: arrays[f"weights/{name}"]
    weights = {f"{name}.kernel": w(f"w{name}.weight").T for name in "qkvo"}
    weights |= {"logit_kernel": w("mta_kernel")[:, 0], "head_kernel": w("head_kernel"), "norm.scale": w("subln.weight")}
    weights |= {"gate.kernel": w("gate.weight").T, "gate.bias": w("gate.bias"), "scale": np.float32(0.2 + 0.6 * np.exp(-0.6))}
    options = {"query_taps": 3, "key_taps": 5, "mixed_heads": 2, "gate": True, "positions": None}
    return MTAConfig(num_heads=HEADS, head_dim=HEAD_DIM, **options), weights


def build(config: MixerConfig, layer_index: int = 2) -> nnx.Module:
    return config.build(WIDTH, BuildContext(layer_index=layer_index, num_layers=4, rngs=nnx.Rngs(0), seq_len=LENGTH))


def golden_arrays(name: str) -> Arrays:
    with np.load(Path(*golden.__path__) / f"{name}.npz") as found:
        return dict(found)


def assert_golden(layer: nnx.Module, call: Callable[[nnx.Module, jax.Array], jax.Array], arrays: Arrays) -> None:
    graph, state = nnx.split(layer)

    @quick_jit
    def run(state, x, cotangent):
        y, pull = jax.vjp(lambda x: call(nnx.merge(graph, state), x), x)
        return y, *pull(cotangent)

    y, gradient = run(state, arrays["x"], arrays["cotangent"])
    assert_close(y, arrays["output"])
    assert_close(gradient, arrays["gradient"])


@pytest.mark.proves("cog", "neural_attention", "mta")
@pytest.mark.parametrize("ours", [cog, neural_attention, mta])
def test_golden(ours):
    arrays = golden_arrays(ours.__name__)
    config, weights = ours(arrays)
    assert_golden(filled(build(config), weights), lambda layer, x: layer(x, at=AT, carry={}).y, arrays)


def test_golden_gaam():
    arrays = golden_arrays("gaam")
    of_heads = lambda name: np.stack([arrays[f"weights/attention_heads.{i}.{name}"] for i in range(HEADS)])
    weights = {"offset": of_heads("mean_offsets"), "log_width": np.log(of_heads("c"))}
    layer = filled(build(GAAMConfig(num_heads=HEADS, num_gaussians=2)), weights)
    assert_golden(layer, lambda layer, x: layer(x, at=AT).y, arrays)


def test_mta_scales_by_depth():
    for layer in range(3):
        assert float(build(MTAConfig.example(), layer).scale[...]) == pytest.approx(1 - (0.8 - 0.6 * np.exp(-0.3 * layer)))

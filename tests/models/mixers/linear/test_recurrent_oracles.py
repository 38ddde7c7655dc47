"""Recurrent layers against those of `transformers` and fla: outputs and gradients, committed golden numbers and live."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.linear.deltanet import DeltaNetConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gated_deltaproduct import GatedDeltaProductConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lightnet import LightNetConfig
from plait.models.mixers.linear.lightning import LightningConfig
from plait.models.mixers.linear.retnet import RetNetConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_recur
from plait.tests.models.golden.generate import BATCH, LENGTH, WIDTH, Arrays
from plait.tests.tolerances import assert_close

GOLDEN = Path(generate_recur.__file__).parent
AT = layout(*[(LENGTH,)] * BATCH, length=LENGTH)
LAYER = 1  # of generate_recur.LAYERS


class Weights:
    """Those of a layer there, by their names."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays

    def __call__(self, name: str) -> np.ndarray:
        return self.arrays[f"weights/{name}"]

    def dense(self, **names: str) -> Arrays:
        """Kernels by our name for theirs."""
        return {f"{ours}.kernel": self(f"{theirs}.weight").T for ours, theirs in names.items()}

    def low_rank(self, ours: str, down: str, up: str) -> Arrays:
        """The two kernels of a projection through a waist."""
        return {f"{ours}.down.kernel": self(f"{down}.weight").T, f"{ours}.up.kernel": self(f"{up}.weight").T}

    def convolutions(self) -> Arrays:
        """Taps [size, channels] of q, k and v, which some layers there hold in one."""
        if "weights/conv1d.weight" in self.arrays:
            sizes = [len(self(f"{n}_proj.weight")) for n in "qk"]
            parts = np.split(self("conv1d.weight"), np.cumsum(sizes))
        else:
            parts = [self(f"{n}_conv1d.weight") for n in "qkv"]
        return {f"{n}_conv.weight": part[:, 0].T for n, part in zip("qkv", parts, strict=True)}


def gla(w: Weights):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", gate="g_proj", o="o_proj", decay_down="gk_proj.0", decay_up="gk_proj.1")
    weights |= {"decay_up.bias": w("gk_proj.1.bias"), "norm.scale": w("g_norm_swish_gate.weight")}
    return GLAConfig(num_heads=2, gate_rank=3), weights


def retnet(w: Weights):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", gate="g_proj", o="o_proj")
    return RetNetConfig(num_heads=2), weights | {"norm.scale": w("g_norm_swish_gate.weight")}


def hgrn2(w: Weights):
    bound = w.arrays["lower_bound"]
    start = LAYER / generate_recur.LAYERS
    weights = w.dense(q="q_proj", f="f_proj", i="i_proj", o="o_proj") | {"norm.scale": w("g_norm.weight")}
    weights["lower_bound.bias"] = np.log(bound / (1 - bound)) - np.log(start / (1 - start))
    return HGRN2Config(head_dim=8), weights


def lightnet(w: Weights):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", o="o_proj") | w.low_rank("gate", "g_proj.0", "g_proj.1")
    return LightNetConfig(head_dim=8, gate_rank=5), weights | {"norm.scale": w("g_norm.weight")}


def deltanet(w: Weights, gated: bool = False):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", b="b_proj", o="o_proj") | w.convolutions()
    weights |= {"norm.scale": w("o_norm.weight")} | (w.dense(gate="g_proj") if gated else {})
    return DeltaNetConfig(num_heads=2, head_dim=8, gate=gated, negative_eigenvalues=gated), weights


def deltanet_gated(w: Weights):
    return deltanet(w, gated=True)


def gated_deltanet_weights(w: Weights) -> Arrays:
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", a="a_proj", b="b_proj", gate="g_proj", o="o_proj") | w.convolutions()
    return weights | {"A_log": w("A_log"), "dt_bias": w("dt_bias"), "norm.scale": w("o_norm.weight")}


def olmo_hybrid(w: Weights):
    config = GatedDeltaNetConfig(num_heads=2, head_dim=4, expand_v=1.5, negative_eigenvalues=True)
    return config, gated_deltanet_weights(w)


def gated_deltaproduct(w: Weights):
    """There the steps are the outermost axis of keys, values and strengths; here the heads."""
    heads = {"k": 2, "v": 4, "b": 4}
    weights = gated_deltanet_weights(w)
    for name in ("k.kernel", "v.kernel", "b.kernel", "k_conv.weight", "v_conv.weight"):
        steps_first = weights[name].reshape(len(weights[name]), 3, heads[name[0]], -1)
        weights[name] = np.swapaxes(steps_first, 1, 2).reshape(weights[name].shape)
    config = GatedDeltaProductConfig(num_heads=2, num_v_heads=4, head_dim=4, expand_v=1.5, num_householder=3)
    return config, weights


def kda_bounded(w: Weights):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", b="b_proj", o="o_proj") | w.convolutions()
    weights |= w.low_rank("f", "f_proj.0", "f_proj.1") | w.low_rank("gate", "g_proj.0", "g_proj.1")
    weights |= {
        "A_log": w("A_log"),
        "dt_bias": w("dt_bias"),
        "norm.scale": w("o_norm.weight"),
        "gate.up.bias": w("g_proj.1.bias"),
    }
    return KDAConfig(num_heads=2, head_dim=8, lower_bound=-5.0), weights


def kimi_linear(w: Weights):
    weights = w.dense(q="q_proj", k="k_proj", v="v_proj", b="b_proj", o="o_proj") | w.convolutions()
    weights |= w.low_rank("f", "forget_gate.f_a_proj", "forget_gate.f_b_proj") | w.low_rank("gate", "g_a_proj", "g_b_proj")
    weights |= {"A_log": w("forget_gate.A_log").reshape(-1), "dt_bias": w("forget_gate.dt_bias")}
    weights |= {"norm.scale": w("o_norm.weight"), "gate.up.bias": np.zeros(12, np.float32)}
    return KDAConfig(num_heads=3, head_dim=4), weights


def minimax(w: Weights):
    """There q, k and v of each head lie side by side."""
    parts = w("qkv_proj.weight").reshape(3, 3, 6, WIDTH)
    weights = {f"{n}.kernel": parts[:, i].reshape(-1, WIDTH).T for i, n in enumerate("qkv")}
    weights |= w.dense(gate="output_gate", o="out_proj") | {"norm.scale": w("norm.weight")}
    return LightningConfig(num_heads=3, head_dim=6), weights


_ALL = (
    gla,
    retnet,
    hgrn2,
    lightnet,
    deltanet,
    deltanet_gated,
    olmo_hybrid,
    gated_deltaproduct,
    kda_bounded,
    kimi_linear,
    minimax,
)
OURS = {f.__name__: f for f in _ALL}


def run(config: MixerConfig, weights: Arrays, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Output, and the gradient in x of `output . cotangent`, of the layer with these parameters by dotted path."""
    ctx = BuildContext(layer_index=LAYER, num_layers=generate_recur.LAYERS, rngs=nnx.Rngs(0), seq_len=LENGTH)
    graph, params, rest = nnx.split(config.build(WIDTH, ctx), nnx.Param, ...)
    found = []
    for path, variable in nnx.to_flat_state(params):
        value = weights.pop(".".join(map(str, path)))
        assert value.shape == variable.shape, path
        found.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    assert not weights, weights.keys()

    def outputs(params, x, cotangent):
        y, pull = jax.vjp(lambda x: nnx.merge(graph, params, rest)(x, at=AT, carry={}).y, x)
        return y, *pull(cotangent)

    return quick_jit(outputs)(nnx.from_flat_state(found), arrays["x"], arrays["cotangent"])


def check(name: str, arrays: Arrays) -> None:
    y, gradient = run(*OURS[name](Weights(arrays)), arrays)
    assert_close(y, arrays["output"], err_msg="output")
    assert_close(gradient, arrays["gradient"], err_msg="gradient")


@pytest.mark.proves("gla", "retnet", "hgrn2", "lightnet", "deltanet", "gated_deltanet", "gated_deltaproduct", "kda", "lightning")
@pytest.mark.parametrize("name", generate_recur.ORACLES)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        check(name, dict(golden))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "fla", "einops")),
    reason="needs the oracle packages torch, transformers, einops and fla",
)
@pytest.mark.parametrize("name", generate_recur.ORACLES)
def test_live(name):
    check(name, generate_recur.ORACLES[name](seed=7))

"""Layers that scan against those of others: outputs and gradients, committed and, where the packages are, live."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.linear.gated_conv import GatedConvConfig
from plait.models.mixers.linear.hgrn import HGRNConfig
from plait.models.mixers.linear.mamba1 import Mamba1Config
from plait.models.mixers.linear.rg_lru import RGLRUConfig
from plait.models.mixers.linear.rwkv7 import FIRST_VALUES, RWKV7Config
from plait.tests.models.common import quick_jit
from plait.tests.models.golden import generate_scan
from plait.tests.models.golden.generate import LENGTH, WIDTH, Arrays
from plait.tests.models.golden.generate_scan import HEAD_DIM, LAYERS
from plait.tests.models.test_oracles import AT, GOLDEN, filled
from plait.tests.tolerances import assert_close


def layer(config: MixerConfig, weights: Arrays, arrays: Arrays, carry: Any = None, **surroundings: Any) -> dict[str, jax.Array]:
    """The output of a layer with another's weights, and the gradient in its input of `output . cotangent`."""
    ctx = BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, **surroundings)
    graph, state = nnx.split(filled(config.build(WIDTH, ctx), weights))

    @quick_jit
    def run(state: nnx.State, x: jax.Array) -> dict[str, jax.Array]:
        y, pull = jax.vjp(lambda x: nnx.merge(graph, state)(x, at=AT, carry=carry or {}).y, x)
        return {"output": y, "gradient": pull(jnp.asarray(arrays["cotangent"]))[0]}

    return run(state, arrays["x"])


def named(arrays: Arrays) -> Callable[[str], np.ndarray]:
    return lambda name: arrays[f"weights/{name}"]


def hgrn(arrays: Arrays) -> Any:
    """The bound there is one of three layers'; ours starts at a third and has its own log-odds on top."""
    w, bound = named(arrays), arrays["lower_bound"]
    weights = {
        f"{ours}.kernel": w(f"{theirs}_proj.weight").T for ours, theirs in zip(("i", "f", "gate", "o"), "ifgo", strict=True)
    }
    weights |= {"norm.scale": w("g_norm.weight"), "lower_bound.start": np.float32(1 / LAYERS)}
    weights["lower_bound.bias"] = (np.log(bound / (1 - bound)) - np.log(0.5)).astype(np.float32)
    return layer(HGRNConfig(), weights, arrays, layer_index=1, num_layers=LAYERS)


def rwkv7(arrays: Arrays) -> Any:
    w = named(arrays)
    weights = {"mixes": np.concatenate([w(f"x_{n}")[0] for n in "rwkvag"])}
    weights |= {f"{n}.kernel": w(f"{n}_proj.weight").T for n in "rkvo"}
    for ours, theirs in (("w", "w"), ("a", "a"), ("to_first", "v"), ("g", "g")):
        weights |= {f"{ours}.{n}.kernel": w(f"{theirs}_lora.lora.{i}.weight").T for n, i in (("down", 0), ("up", 2))}
        if theirs != "g":
            weights[f"{ours}.bias"] = w(f"{theirs}_lora.lora.2.bias")
    weights |= {"removed": w("k_k"), "replaced": w("k_a"), "bonus": w("r_k").reshape(-1), "is_first": np.asarray(False)}
    weights |= {"group_norm.scale": w("g_norm.weight"), "group_norm.bias": w("g_norm.bias")}
    config = RWKV7Config(head_dim=HEAD_DIM, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6, norm_eps=HEAD_DIM * 1e-5)
    first = jnp.asarray(arrays["first"]).reshape(*arrays["first"].shape[:2], -1, HEAD_DIM)
    surroundings = {"layer_index": 1, "num_layers": LAYERS, "first_layers": {FIRST_VALUES: 0}}
    return layer(config, weights, arrays, {FIRST_VALUES: first}, **surroundings)


def rg_lru(arrays: Arrays) -> Any:
    w = named(arrays)
    weights = {"conv.weight": w("conv_1d.weight")[:, 0].T, "conv.bias": w("conv_1d.bias"), "rate": w("rg_lru.recurrent_param")}
    for ours, theirs in (("x", "linear_x"), ("y", "linear_y"), ("o", "linear_out")):
        weights |= {f"{ours}.kernel": w(f"{theirs}.weight").T, f"{ours}.bias": w(f"{theirs}.bias")}
    for ours, theirs in (("input_gate", "input_gate"), ("decay_gate", "recurrent_gate")):
        weights |= {f"{ours}.kernel": w(f"rg_lru.{theirs}_weight"), f"{ours}.bias": w(f"rg_lru.{theirs}_bias")}
    return layer(RGLRUConfig(head_dim=6, expand=1.5), weights, arrays)


def lfm2_conv(arrays: Arrays) -> Any:
    w = named(arrays)
    weights = {"conv.weight": w("conv.weight")[:, 0].T, "conv.bias": w("conv.bias")}
    weights |= {"o.kernel": w("out_proj.weight").T, "o.bias": w("out_proj.bias")}
    for i, name in enumerate("bcv"):
        part = slice(i * WIDTH, (i + 1) * WIDTH)
        weights |= {f"{name}.kernel": w("in_proj.weight")[part].T, f"{name}.bias": w("in_proj.bias")[part]}
    return layer(GatedConvConfig(use_bias=True), weights, arrays)


def mamba(arrays: Arrays, norm_eps: float | None = None) -> Any:
    w = named(arrays)
    x, z = np.split(w("in_proj.weight"), 2)
    down, B, C = np.split(w("x_proj.weight"), [3, 7])
    kernels = {"x": x, "z": z, "dt_down": down, "B": B, "C": C, "dt_up": w("dt_proj.weight"), "o": w("out_proj.weight")}
    weights = {f"{name}.kernel": kernel.T for name, kernel in kernels.items()}
    weights |= {"conv.weight": w("conv1d.weight")[:, 0].T, "conv.bias": w("conv1d.bias")}
    weights |= {"A_log": w("A_log").T, "D": w("D"), "dt_bias": w("dt_proj.bias")}
    return layer(Mamba1Config(state_dim=4, dt_rank=3, norm_eps=norm_eps), weights, arrays)


def falcon_mamba(arrays: Arrays) -> Any:
    return mamba(arrays, norm_eps=1e-6)


OURS = {f.__name__: f for f in (hgrn, rwkv7, rg_lru, lfm2_conv, mamba, falcon_mamba)}


def golden(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_agrees(found: Any, arrays: Arrays) -> None:
    assert_close(found["output"], arrays["output"], err_msg="output")
    assert_close(found["gradient"], arrays["gradient"], err_msg="gradient")


@pytest.mark.proves("hgrn", "rwkv7", "rg_lru", "gated_conv", "mamba1")
@pytest.mark.parametrize("name", generate_scan.ORACLES)
def test_golden(name: str):
    arrays = golden(name)
    assert_agrees(OURS[name](arrays), arrays)


@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "fla")),
    reason="needs the oracle packages torch, transformers and fla",
)
@pytest.mark.parametrize("name", generate_scan.ORACLES)
def test_live(name: str):
    arrays = generate_scan.ORACLES[name](seed=7)
    assert_agrees(OURS[name](arrays), arrays)

"""Softmax attention and MLA with the options and positions of published checkpoints, against the layers of `transformers`."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.base import PositionConfig
from plait.models.positions.learned import LearnedConfig
from plait.models.positions.relative import RelativeConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_linear import LinearRotaryConfig
from plait.models.positions.rotary_llama3 import Llama3RotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate_soft
from plait.tests.models.golden.generate_soft import BATCH, LENGTH, WIDTH, Arrays, cotangent, hidden
from plait.tests.models.test_oracles import filled
from plait.tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[2] / "golden"
AT = layout(*[(LENGTH,)] * BATCH, length=LENGTH)
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
Ours = tuple[MixerConfig, Arrays, bool, PositionConfig | None]


def kernels(arrays: Arrays, names: dict[str, str], *, biases: str = "") -> Arrays:
    """Our kernels by the names of theirs, with the biases of some."""
    weights = {f"{ours}.kernel": arrays[f"weights/{theirs}.weight"].T for ours, theirs in names.items()}
    return weights | {f"{ours}.bias": arrays[f"weights/{names[ours]}.bias"] for ours in biases}


PROJECTIONS = {n: f"{n}_proj" for n in "qkvo"}


def llama31(arrays: Arrays) -> Ours:
    positions = Llama3RotaryConfig(theta=1e4, original_len=64)
    return SoftmaxConfig(**GROUPED, positions=positions), kernels(arrays, PROJECTIONS), True, None


def llama_linear(arrays: Arrays) -> Ours:
    return SoftmaxConfig(**GROUPED, positions=LinearRotaryConfig(factor=4.0)), kernels(arrays, PROJECTIONS), True, None


def qwen2(arrays: Arrays) -> Ours:
    positions = YarnRotaryConfig(factor=4.0, original_len=64)
    config = SoftmaxConfig(**GROUPED, qkv_bias=True, positions=positions)
    return config, kernels(arrays, PROJECTIONS, biases="qkv"), True, None


def gpt_oss_yarn(arrays: Arrays) -> Ours:
    positions = YarnRotaryConfig(factor=8.0, original_len=64, beta_fast=4.0, truncate=False)
    config = SoftmaxConfig(**GROUPED, qkv_bias=True, o_bias=True, sink_logits=True, positions=positions)
    return config, kernels(arrays, PROJECTIONS, biases="qkvo") | {"sinks": arrays["weights/sinks"]}, True, None


def olmo2(arrays: Arrays) -> Ours:
    weights = kernels(arrays, PROJECTIONS) | {f"{n}_norm.scale": arrays[f"weights/{n}_norm.weight"] for n in "qk"}
    return SoftmaxConfig(**GROUPED, qk_norm=True, qk_norm_over="width", qk_norm_eps=1e-5), weights, True, None


def fused_by_head(arrays: Arrays, heads: int, name: str) -> Arrays:
    """Ours of one projection to the q, k and v of each head, and of the output's."""
    weight, bias = (arrays[f"weights/{name}.{kind}"] for kind in ("weight", "bias"))
    parts = weight.reshape(heads, 3, -1, WIDTH), bias.reshape(heads, 3, -1)
    found = {}
    for i, ours in enumerate("qkv"):
        found |= {f"{ours}.kernel": parts[0][:, i].reshape(-1, WIDTH).T, f"{ours}.bias": parts[1][:, i].reshape(-1)}
    return found | kernels(arrays, {"o": "dense"}, biases="o")


def gpt_neox(arrays: Arrays) -> Ours:
    config = SoftmaxConfig(num_heads=3, head_dim=8, qkv_bias=True, o_bias=True, positions=RotaryConfig(fraction=0.5))
    return config, fused_by_head(arrays, 3, "query_key_value"), True, None


def bloom(arrays: Arrays) -> Ours:
    config = SoftmaxConfig(num_heads=6, head_dim=4, qkv_bias=True, o_bias=True, positions=ALiBiConfig())
    return config, fused_by_head(arrays, 6, "query_key_value"), True, None


def gpt2(arrays: Arrays) -> Ours:
    w = lambda name: arrays[f"weights/attention.{name}"]
    kernel, bias = (np.split(w(f"c_attn.{kind}"), 3, axis=-1) for kind in ("weight", "bias"))
    weights = {f"{n}.kernel": kernel[i] for i, n in enumerate("qkv")} | {f"{n}.bias": bias[i] for i, n in enumerate("qkv")}
    weights |= {"o.kernel": w("c_proj.weight"), "o.bias": w("c_proj.bias")}
    config = SoftmaxConfig(num_heads=3, head_dim=8, qkv_bias=True, o_bias=True, positions=None)
    return config, weights, True, LearnedConfig(max_len=LENGTH + 4)


def _t5(arrays: Arrays, causal: bool) -> Ours:
    positions = RelativeConfig(num_buckets=8, max_distance=12)
    weights = kernels(arrays, {n: n for n in "qkvo"})
    weights |= {"positions.table": arrays["weights/relative_attention_bias.weight"]}
    return SoftmaxConfig(num_heads=4, head_dim=8, scale=1.0, positions=positions), weights, causal, None


def t5_decoder(arrays: Arrays) -> Ours:
    return _t5(arrays, True)


def t5_encoder(arrays: Arrays) -> Ours:
    return _t5(arrays, False)


def deepseek_yarn(arrays: Arrays) -> Ours:
    """The layer there fuses latent and shared key, and keys and values."""
    w = lambda name: arrays[f"weights/{name}.weight"].T
    up = w("kv_b_proj").reshape(12, 4, -1)
    weights = {
        "q.kernel": w("q_proj"),
        "kv_down.kernel": w("kv_a_proj_with_mqa")[:, :12],
        "k_rope.kernel": w("kv_a_proj_with_mqa")[:, 12:],
        "kv_norm.scale": arrays["weights/kv_a_layernorm.weight"],
        "k_up.kernel": up[..., :6].reshape(12, -1),
        "v_up.kernel": up[..., 6:].reshape(12, -1),
        "o.kernel": w("o_proj"),
    }
    positions = YarnRotaryConfig(factor=8.0, original_len=64, mscale=0.7, interleaved=True)
    config = MLAConfig(num_heads=4, kv_rank=12, nope_head_dim=6, rope_head_dim=4, v_head_dim=5, positions=positions)
    return config, weights, True, None


OURS = {
    f.__name__: f
    for f in (llama31, llama_linear, qwen2, gpt_oss_yarn, olmo2, gpt_neox, bloom, gpt2, t5_decoder, t5_encoder, deepseek_yarn)
}


def run(name: str, arrays: Arrays, seed: int) -> tuple[jax.Array, jax.Array]:
    """Our output, and its gradient in the input."""
    config, weights, causal, embedded = OURS[name](arrays)
    ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal)
    graph, state = nnx.split(filled(config.build(WIDTH, ctx), weights))
    positions = None if embedded is None else embedded.build(ctx, WIDTH, 1)
    if positions is not None:
        positions.table[...] = jnp.asarray(arrays["weights/positions.weight"])

    @quick_jit
    def both(state, x):
        def y(x):
            return nnx.merge(graph, state)(x if positions is None else positions.add(x, AT), at=AT, carry={}).y

        y, pull = jax.vjp(y, x)
        return y, pull(jnp.asarray(cotangent(seed)))[0]

    return both(state, hidden(seed))


@pytest.mark.proves("softmax", "mla")
@pytest.mark.parametrize("name", generate_soft.ORACLES)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = dict(golden)
    y, gradient = run(name, arrays, 0)
    assert_close(y, arrays["output"])
    assert_close(gradient, arrays["gradient"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the oracle packages torch and transformers",
)
@pytest.mark.parametrize("name", generate_soft.ORACLES)
def test_live(name):
    arrays = generate_soft.ORACLES[name](seed=7)
    y, gradient = run(name, arrays, 7)
    assert_close(y, arrays["output"])
    assert_close(gradient, arrays["gradient"])

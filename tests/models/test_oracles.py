"""Our models and layers against those of `transformers`: committed golden numbers, and live where both can be imported."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.lm import LM
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.mla import MLAConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.positions.rotary import RotaryConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.golden import generate
from plait.tests.models.golden.generate import BATCH, LENGTH, VOCAB, WIDTH, WINDOW, Arrays
from plait.tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
AT = layout(*[(LENGTH,)] * BATCH, length=LENGTH)


def filled(module: nnx.Module, weights: Arrays) -> nnx.Module:
    """`module` with `weights` by dotted path; each is used and each path has one."""
    graph, state = nnx.split(module)
    weights = dict(weights)
    found = []
    for path, variable in nnx.to_flat_state(state):
        value = weights.pop(".".join(map(str, path)))
        assert value.shape == variable.shape, path
        found.append((path, variable.replace(jnp.asarray(value))))
    assert not weights, weights.keys()
    return nnx.merge(graph, nnx.from_flat_state(found))


def decoder(arrays: Arrays, mixer: SoftmaxConfig, qk_norm: bool) -> np.ndarray:
    """Logits of the language model with a decoder's weights, its layers stacked."""
    w = lambda name: arrays[f"weights/{name}.weight"]
    layers = lambda name: np.stack([w(f"model.layers.{i}.{name}") for i in range(2)])
    block = "stack.periods.0"
    weights = {
        "embedding": w("model.embed_tokens"),
        "norm.scale": w("model.norm"),
        "head.kernel": w("lm_head").T,
        f"{block}.mixer_norm.scale": layers("input_layernorm"),
        f"{block}.channel_norm.scale": layers("post_attention_layernorm"),
        **{f"{block}.mixer.{n}.kernel": layers(f"self_attn.{n}_proj").swapaxes(1, 2) for n in "qkvo"},
        **{f"{block}.channel_mixer.{n}.kernel": layers(f"mlp.{n}_proj").swapaxes(1, 2) for n in ("gate", "up", "down")},
    }
    if qk_norm:
        weights |= {f"{block}.mixer.{n}_norm.scale": layers(f"self_attn.{n}_norm") for n in "qk"}
    config = LMConfig(
        d_model=WIDTH,
        num_layers=2,
        pattern="softmax",
        mixers={"softmax": mixer},
        channel_mixer=GatedMLPConfig(hidden_dim=24),
        vocab_size=VOCAB,
    )
    graph, state = nnx.split(filled(LM(config, rngs=nnx.Rngs(0), seq_len=LENGTH), weights))
    at = Tokens(jnp.asarray(arrays["tokens"]), AT.segment_ids, AT.positions)
    return quick_jit(lambda state: nnx.merge(graph, state)(at)[0])(state)


def layer(config: MixerConfig, weights: Arrays, x: np.ndarray) -> np.ndarray:
    ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=LENGTH)
    graph, state = nnx.split(filled(config.build(WIDTH, ctx), weights))
    return quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).y)(state, x)


ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def llama(arrays: Arrays) -> np.ndarray:
    return decoder(arrays, SoftmaxConfig(**ATTENTION), qk_norm=False)


def qwen3(arrays: Arrays) -> np.ndarray:
    return decoder(arrays, SoftmaxConfig(**ATTENTION, qk_norm=True, positions=RotaryConfig(theta=1e6)), qk_norm=True)


def gpt_oss(arrays: Arrays, window_size: int | None = None) -> np.ndarray:
    weights = {f"{n}.kernel": arrays[f"weights/{n}_proj.weight"].T for n in "qkvo"} | {"sinks": arrays["weights/sinks"]}
    return layer(SoftmaxConfig(**ATTENTION, sink_logits=True, window_size=window_size), weights, arrays["x"])


def gpt_oss_window(arrays: Arrays) -> np.ndarray:
    return gpt_oss(arrays, WINDOW)


def qwen3_next(arrays: Arrays) -> np.ndarray:
    """The layer there fuses its projections by key head: q, k, the values and gates of its value heads; and their b and a."""
    config = GatedDeltaNetConfig(num_heads=2, num_v_heads=4, head_dim=4, expand_v=1.5, norm_eps=1e-6)
    w = lambda name: arrays[f"weights/{name}"]
    grouped = lambda name, sizes: np.split(w(name).reshape(2, -1, WIDTH), np.cumsum(sizes)[:-1], axis=1)
    fused = dict(zip(("q", "k", "v", "gate"), grouped("in_proj_qkvz.weight", (4, 4, 12, 12)), strict=True))
    fused |= dict(zip(("b", "a"), grouped("in_proj_ba.weight", (2, 2)), strict=True))
    convolutions = np.split(w("conv1d.weight")[:, 0].T, (8, 16), axis=1)  # [taps, channels]
    weights = {
        **{f"{name}.kernel": kernel.reshape(-1, WIDTH).T for name, kernel in fused.items()},
        **{f"{n}_conv.weight": taps for n, taps in zip("qkv", convolutions, strict=True)},
        "A_log": w("A_log"),
        "dt_bias": w("dt_bias"),
        "norm.scale": w("norm.weight"),
        "o.kernel": w("out_proj.weight").T,
    }
    return layer(config, weights, arrays["x"])


def mamba2(arrays: Arrays) -> np.ndarray:
    """The layer there has one projection for z, x, B, C and dt, and one convolution for x, B and C."""
    w = lambda name: arrays[f"weights/{name}"]
    names, ends = ("z", "x", "B", "C", "dt"), np.cumsum([32, 32, 12, 12])
    weights = {f"{n}.kernel": kernel.T for n, kernel in zip(names, np.split(w("in_proj.weight"), ends), strict=True)}
    for name, axis, values in (("weight", 1, w("conv1d.weight")[:, 0].T), ("bias", 0, w("conv1d.bias"))):
        for n, part in zip(("x", "B", "C"), np.split(values, [32, 44], axis=axis), strict=True):
            weights[f"{n}_conv.{name}"] = part
    weights |= {name: w(name) for name in ("A_log", "dt_bias", "D")}
    weights |= {"norm.scale": w("norm.weight"), "o.kernel": w("out_proj.weight").T}
    return layer(Mamba2Config(head_dim=8, state_dim=6, num_groups=2), weights, arrays["x"])


def _mla(arrays: Arrays, q_rank: int | None) -> np.ndarray:
    """The layer there pairs neighbouring channels in its rotary embedding, and fuses latent and shared key, and keys and values."""
    w = lambda name: arrays[f"weights/{name}.weight"].T
    heads, nope, rope, kv_rank = 4, 6, 4, 12
    halves = np.r_[0:rope:2, 1:rope:2]
    q = w("q_proj" if q_rank is None else "q_b_proj").reshape(-1, heads, nope + rope)
    q = np.concatenate([q[..., :nope], q[..., nope:][..., halves]], axis=-1)
    up = w("kv_b_proj").reshape(kv_rank, heads, -1)
    weights = {
        "q.kernel": q.reshape(len(q), -1),
        "kv_down.kernel": w("kv_a_proj_with_mqa")[:, :kv_rank],
        "k_rope.kernel": w("kv_a_proj_with_mqa")[:, kv_rank:][:, halves],
        "kv_norm.scale": w("kv_a_layernorm"),
        "k_up.kernel": up[..., :nope].reshape(kv_rank, -1),
        "v_up.kernel": up[..., nope:].reshape(kv_rank, -1),
        "o.kernel": w("o_proj"),
    }
    if q_rank is not None:
        weights |= {"q_down.kernel": w("q_a_proj"), "q_norm.scale": w("q_a_layernorm")}
    config = MLAConfig(num_heads=heads, kv_rank=kv_rank, q_rank=q_rank, nope_head_dim=nope, rope_head_dim=rope, v_head_dim=5)
    return layer(config, weights, arrays["x"])


def mla(arrays: Arrays) -> np.ndarray:
    return _mla(arrays, 10)


def mla_full_queries(arrays: Arrays) -> np.ndarray:
    return _mla(arrays, None)


OURS = {f.__name__: f for f in (llama, qwen3, gpt_oss, gpt_oss_window, qwen3_next, mamba2, mla, mla_full_queries)}


@pytest.mark.proves("softmax", "mla", "gated_deltanet", "mamba2")
@pytest.mark.parametrize("name", generate.ORACLES)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = dict(golden)
    assert_close(OURS[name](arrays), arrays["output"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the oracle packages torch and transformers",
)
@pytest.mark.parametrize("name", generate.ORACLES)
def test_live(name):
    arrays = generate.ORACLES[name](seed=7)
    assert_close(OURS[name](arrays), arrays["output"])

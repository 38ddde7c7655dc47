"""Mixtures of experts against `transformers`: golden files, and the modules themselves where they are installed."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.channel_mixers.moe import MoEConfig
from plait.tests.models.channel_mixers.golden import generate
from plait.tests.tolerances import assert_close

GOLDEN = Path(__file__).parent / "golden"
OURS = {
    "qwen3_moe": MoEConfig(num_experts=6, top_k=3, hidden_dim=8),
    "deepseek_v3": MoEConfig(
        num_experts=6, top_k=2, hidden_dim=8, num_shared_experts=2, scores="sigmoid", routed_scale=2.5, balance_bias=0.001
    ),
}


def output(config: MoEConfig, arrays) -> np.ndarray:
    mixer = config.build(arrays["x"].shape[-1], BuildContext(rngs=nnx.Rngs(0), seq_len=1))
    weight = lambda name: jnp.asarray(arrays[f"weights/{name}"].swapaxes(-1, -2))
    mixer.router.kernel[...] = weight("gate.weight")
    mixer.gate.kernel[...], mixer.up.kernel[...] = jnp.split(weight("experts.gate_up_proj"), 2, axis=-1)
    mixer.down.kernel[...] = weight("experts.down_proj")
    if mixer.shared is not None:
        for name in ("gate", "up", "down"):
            getattr(mixer.shared, name).kernel[...] = weight(f"shared_experts.{name}_proj.weight")
    if mixer.bias is not None:
        mixer.bias[...] = jnp.asarray(arrays["weights/gate.e_score_correction_bias"])
    return mixer(jnp.asarray(arrays["x"]), at=Tokens()).y


@pytest.mark.parametrize("name", generate.ORACLES)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = dict(golden)
    assert_close(output(OURS[name], arrays), arrays["output"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the oracle packages torch and transformers",
)
@pytest.mark.parametrize("name", generate.ORACLES)
def test_live(name):
    arrays = generate.ORACLES[name](seed=7)
    assert_close(output(OURS[name], arrays), arrays["output"])

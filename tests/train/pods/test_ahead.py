"""Whole training steps through the real compilers, ahead of time, with the kernels in them; needs libtpu or the CUDA plugin."""

import dataclasses
import importlib.util
import re
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import optimizer
from plait.configs.presets import presets
from plait.data.config import DataConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.train.mesh import make_mesh
from plait.train.program import Program

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs the extra aot")


@pytest.fixture(autouse=True)
def quiet_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metadata server, and several processes at once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _compile(config: ExperimentConfig, devices: list[Any], generation: str) -> str:
    config = dataclasses.replace(config, model=config.model.with_vocab(config.data.vocab_size or 1000))
    lowered = Program.of(config, make_mesh(config.mesh, devices)).lower(generation=generation)
    return lowered.compile().as_text()


def _tpu_kernels(text: str) -> set[str]:
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return {found[0] for line in calls if (found := re.search(r"(attention|erase_and_write|short_conv)[a-z_]*[a-z]", line))}


@TPU
def test_small_hybrid_step_compiles_for_tpu():
    model = LMConfig(
        d_model=256, num_layers=2, pattern="gated_deltanet,softmax", vocab_size=1000,
        mixers={
            "softmax": SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=64),
            "gated_deltanet": GatedDeltaNetConfig(num_heads=2, head_dim=64, expand_v=1.0),
        },
    )  # fmt: skip
    config = ExperimentConfig(
        name="small",
        steps=1000,
        model=model,
        data=DataConfig(seq_len=512, batch_size=4),
        optimizer=optimizer("adamw"),
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    found = _tpu_kernels(_compile(config, devices, "v5e"))
    assert {"attention_forward", "attention_gradients"} <= found
    assert {"erase_and_write_forward", "erase_and_write_backward"} <= found


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hybrid_340m", "transformer_340m"])
def test_preset_step_compiles_for_16_v5e(preset: str):
    config = presets()[preset]()
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=16), optimizer=dataclasses.replace(config.optimizer, accumulate=4))
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    found = _tpu_kernels(_compile(config, devices, "v5e"))
    assert {"attention_forward", "attention_gradients"} <= found
    assert preset != "hybrid_340m" or {"erase_and_write_forward", "erase_and_write_backward"} <= found


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for GPUs needs JAX 0.11.2 and the CUDA plugin",
)
@pytest.mark.parametrize("preset", ["hybrid_340m", "transformer_340m"])
def test_preset_step_compiles_for_8_h100(preset: str):
    from plait.tests.kernels.gpu_targets import TARGETS

    config = dataclasses.replace(presets()[preset](), mesh=MeshConfig(fsdp=8))
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x8", target_config=TARGETS["h100"]
    )
    text = _compile(config, topology.devices, "h100")
    assert "mosaic_gpu" in text

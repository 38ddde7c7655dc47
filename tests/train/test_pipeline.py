"""Pipeline stages: the numbers of one device with the same micro-batches, what each stage holds, and clear refusals."""

import dataclasses
import importlib.util
import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import optimizer
from plait.configs.probe import ProbeConfig
from plait.data.config import DataConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_statistics_close
from plait.tests.train.common import hybrid, mixture, program_of, random_batch, routed, tiny, tree_arrays
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps
from plait.train.mesh import batch_sharding, make_mesh
from plait.train.pipeline import bubble_fraction
from plait.train.probes.base import Probes
from plait.train.program import Program
from plait.train.state import Blueprint
from plait.train.step import make_step

FOUR = {**SIZES, "model.num_layers": 4, "optimizer.accumulate": 4}
LAYER_OVER = {**SIZES, "model.pattern": "moh+softmax,softmax", "model.num_layers": 5, "optimizer.accumulate": 2}
"""Two periods, and a Mixture-of-Head layer behind them."""


def in_stages(config, **mesh):
    return dataclasses.replace(config, mesh=MeshConfig(**{"data": 1, "pipeline": 2, **mesh}))


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        pytest.param(routed(FOUR), {"data": 2}, marks=pytest.mark.slow, id="data 2"),
        pytest.param(routed(FOUR), {"pipeline": 4}, id="four stages"),
        pytest.param(
            mixture({**LAYER_OVER, "model.remat": "full"}),
            {"fsdp": 2, "zero": True},
            marks=pytest.mark.slow,
            id="a layer over, remat, ZeRO",
        ),
        pytest.param(
            tiny({**SIZES, "model.sigma_reparam": "one"}),
            {"tensor": 2},
            marks=pytest.mark.slow,
            id="one micro-batch, sigmaReparam",
        ),
    ],
)
def test_stages_train_as_one_device(config, mesh, compile_cache):
    assert_same_training(two_steps(in_stages(config, **mesh)), two_steps(config))


@pytest.mark.slow
def test_stages_of_two_kinds_of_layers_train_as_one_device(compile_cache):
    config = hybrid({**FOUR, "model.num_layers": 9, "optimizer.accumulate": 2, "model.remat": "dots"})
    assert_same_training(two_steps(in_stages(config, fsdp=2, tensor=2)), two_steps(config))


def probed(config):
    setup = program_of(config, devices=8)
    rows = batch_sharding(setup.mesh, 8, 16, config.optimizer.accumulate)
    step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, Probes(ProbeConfig(sequences=2))))
    return step(setup.fresh(), jax.device_put(random_batch(8), rows))[1]["statistics"]


@pytest.mark.slow
def test_layers_show_the_same_statistics(compile_cache):
    config = mixture(LAYER_OVER)
    found, expected = probed(in_stages(config, fsdp=2)), probed(config)
    assert len(found) == len(expected) == 5
    got, want = tree_arrays(found), tree_arrays(expected)
    assert got.keys() == want.keys()
    for path in got:
        assert_statistics_close(got[path], want[path], err_msg=path)


def test_a_stage_holds_its_layers_only_and_sends_what_leaves_it():
    config = in_stages(tiny({**FOUR, "model.num_layers": 4}), pipeline=4)
    setup = program_of(config, devices=8)
    like = setup.like
    stacked = [a for name, a in like.params.items() if ".periods." in name]
    assert stacked and {a.sharding.spec[0] for a in stacked} == {"pipeline"}
    assert {a.sharding.shard_shape(a.shape)[0] for a in stacked} == {1}
    text = setup.lower().compile().as_text()
    assert "collective-permute" in text
    kernel = next(a for a in stacked if a.ndim == 3 and a.shape[1] == 16)
    whole = ",".join(map(str, kernel.shape))
    assert f"f32[{whole}]" not in text, "a stage sees the parameters of others"


def test_bubble():
    assert bubble_fraction(1, 8) == 0
    assert bubble_fraction(4, 1) == 3 / 4
    np.testing.assert_allclose(bubble_fraction(4, 12), 3 / 15)


@pytest.mark.parametrize(
    ("layers", "stages", "fits"), [(6, 4, "1, 2, 3, 6"), (8, 16, "1, 2, 4, 8"), (1, 2, "1")], ids=["6/4", "8/16", "1/2"]
)
def test_stages_that_do_not_divide_the_layers_are_refused(layers, stages, fits):
    with pytest.raises(ValueError) as error:
        tiny({"model.num_layers": layers, "mesh": MeshConfig(pipeline=stages)})
    message = str(error.value)
    assert f"mesh.pipeline={stages} must divide the {layers} repetitions of the pattern in model.num_layers={layers}" in message
    assert f"use mesh.pipeline={fits} or another depth" in message


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"optimizer\.accumulate=3 must divide data\.batch_size=8"):
        tiny({"data.batch_size": 8, "optimizer.accumulate": 3, "mesh": MeshConfig(pipeline=2)})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs the extra aot")
def test_stages_compile_for_tpu_with_kernels_and_moments_in_host_memory(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    model = LMConfig(
        d_model=256,
        num_layers=4,
        pattern="softmax",
        mixers={"softmax": SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=64)},
        vocab_size=1024,
        remat="full",
        compute_dtype="bfloat16",
    )
    config = ExperimentConfig(
        name="stages",
        steps=1000,
        model=model,
        data=DataConfig(seq_len=256, batch_size=8),
        optimizer=optimizer("adamw", accumulate=4),
        mesh=MeshConfig(data=1, pipeline=2, tensor=2, offload="optimizer"),
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(config.mesh, devices)
    compiled = Program.of(config, mesh).lower(generation="v5e").compile()
    text = compiled.as_text()
    assert all(f"attention_{kernel}" in text for kernel in ("forward", "gradients"))
    assert text.count("collective-permute-start(") == 2, "one there, one back"
    parts = Blueprint(config).update_shardings(mesh)
    shapes = {name: variable.shape for name, variable in Blueprint(config)._variables.items()}
    moments = sum(2 * 4 * math.prod(part.shard_shape(shapes[name])) for name, part in parts.items())
    assert moments <= compiled.memory_analysis().host_argument_size_in_bytes <= 1.01 * moments

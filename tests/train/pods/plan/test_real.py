"""Plans by the real compilers, ahead of time; needs libtpu or the CUDA plugin, and no accelerator."""

import dataclasses
import importlib.util
from typing import Any

import jax
import pytest

from plait.configs.experiment import ExperimentConfig
from plait.kernels.chips import GIB
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.train.common import changed, tiny
from plait.train.pods.plan.planning import make_plan
from plait.train.pods.plan.report import sections
from plait.train.pods.plan.search import search
from plait.train.pods.plan.step_plan import Plan
from plait.train.pods.plan.topology import TargetError, describe_devices, parse_target

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs the extra aot")
GPU = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2) or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for GPUs needs JAX 0.11.2 and the CUDA plugin",
)


@pytest.fixture(autouse=True)
def default_precision():
    """As users have it: the precision that other tests ask for is not every kernel's."""
    with jax.default_matmul_precision("default"):
        yield


def small(**changes: Any) -> ExperimentConfig:
    """Two softmax layers of width 256 on bytes, bfloat16, whole parameters gathered over four devices."""
    config = tiny({"model.d_model": 256, "data.seq_len": 512, "data.batch_size": 8, "mesh.data": None, "mesh.fsdp": 4})
    mixers = {"softmax": SoftmaxConfig(num_heads=4, head_dim=64)}
    model = dataclasses.replace(config.model, mixers=mixers, compute_dtype="bfloat16", remat="dots")
    return changed(dataclasses.replace(config, model=model), {path.replace("__", "."): value for path, value in changes.items()})


def _check(plan: Plan, kernel: str) -> None:
    assert plan.fits
    assert plan.refusal is None
    assert plan.kernels["attention"].split(", ")[-1] == kernel
    kinds = {c.kind for c in plan.collectives if "fsdp" in c.axes}
    assert "all-gather" in kinds or "all-reduce" in kinds
    assert len(plan.seconds) == len(plan.collectives)
    assert plan.times is not None and plan.traffic is not None and plan.intensity is not None
    assert 0 < plan.times.mfu <= 1
    assert plan.times.bound <= plan.times.serial
    state = plan.memory.parameters + plan.memory.optimizer
    assert plan.traffic > state  # the state alone is read and written
    assert plan.memory.temporaries > 0
    assert all(section.title for section in sections(plan))


@TPU
def test_small_step_on_tpu():
    plan = make_plan(small(), parse_target("v5e:2x2"))
    _check(plan, "pallas_tpu")
    assert plan.memory.limit == 15.75 * GIB


@TPU
def test_a_step_too_big_for_its_tpu_says_what_fits():
    plan = make_plan(small(data__batch_size=4096, data__seq_len=4096), parse_target("v5e:2x2"))
    assert not plan.fits
    assert plan.refusal is not None
    assert plan.memory.compiled
    assert plan.memory.total > 15.75 * GIB
    assert plan.memory.largest == "temporaries"
    assert plan.fixes
    assert "--optimizer.accumulate" in plan.fixes[0].overrides
    assert all(fix.memory.fits for fix in plan.fixes)


@TPU
def test_search_compiles_the_best():
    found, tried = search(small(), parse_target("v5e:2x2"), compile_best=1)
    assert tried > len(found) / 2 > 5
    assert [c.plan is not None for c in found].count(True) == 1
    best = found[0]
    assert best.failure is None
    assert all(c.memory.fits for c in found)
    scores = [c.score for c in found if c.plan is None]
    assert scores == sorted(scores)


@TPU
def test_single_chips_slices_and_pods_are_described():
    counts = {
        text: len(describe_devices(parse_target(text)))
        for text in ("v5e:1x1", "v4:2x2x1", "v6e:16x16", "v5p:16x16x16", "tpu7x:2x2x1")
    }
    assert counts == {"v5e:1x1": 1, "v4:2x2x1": 4, "v6e:16x16": 256, "v5p:16x16x16": 4096, "tpu7x:2x2x1": 8}
    slices = describe_devices(parse_target("v5e:4x4", 3))
    assert {device.slice_index for device in slices} == {0, 1, 2}


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_small_step_on_every_generation(target: str):
    plan = make_plan(small(mesh__fsdp=2), parse_target(target))
    _check(plan, "pallas_tpu")


@TPU
@pytest.mark.slow
def test_slices_exchange_over_the_network():
    plan = make_plan(small(mesh__data=2, mesh__fsdp=4), parse_target("v5e:2x2", 2))
    assert any("network" in text for text in plan.routes.values())


@GPU
@pytest.mark.parametrize("target", ["h100:2x4", "b200:1x8"])
def test_small_step_on_gpus(target: str):
    plan = make_plan(small(), parse_target(target))
    assert plan.fits
    assert plan.times is not None
    assert {"fsdp"} <= {axis for c in plan.collectives for axis in c.axes}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="for machines without libtpu")
def test_without_libtpu_the_error_says_what_to_install():
    with pytest.raises(TargetError, match="plait\\[aot\\]"):
        describe_devices(parse_target("v5e:2x2"))

"""QK-clip and the losses on attention, for which layers look at themselves: the same however a step is divided."""

import dataclasses

import pytest

from plait.configs.mesh import MeshConfig
from plait.models.attention_losses import AttentionLossConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.qk_clip import QKClipConfig
from plait.tests.train.common import changed, tiny
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps

LOSSES = AttentionLossConfig(entropy_floor=1.0, floor=0.9, entropy=0.1, head_diversity=0.3, head_balance=30.0)
THRESHOLD = 3.0
"""Between the largest logits of the heads."""


def looked_at(changes=None):
    """Four layers, two of softmax, that are clipped and have every loss."""
    mixers = {"gla": GLAConfig(num_heads=2), "softmax": SoftmaxConfig(num_heads=2, head_dim=8)}
    model = dataclasses.replace(
        tiny().model,
        pattern="gla,softmax",
        num_layers=4,
        mixers=mixers,
        qk_clip=QKClipConfig(threshold=THRESHOLD),
        attention_loss=LOSSES,
    )
    return changed(dataclasses.replace(tiny(), model=model), {**SIZES, "optimizer.accumulate": 2, **(changes or {})})


@pytest.fixture(scope="module")
def alone(compile_cache):
    """Two steps on one device, of two micro-batches each."""
    return two_steps(looked_at())


def test_heads_are_clipped_and_losses_at_work(alone):
    for metrics in alone[2]:
        assert 0 < int(metrics["optimizer/clipped_heads"]) < 4
        assert all(abs(float(metrics[f"loss/attention/{name}"])) > 1e-3 for name in LOSSES.asked)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mesh": MeshConfig(data=1, pipeline=2)}, id="pipeline"),
        pytest.param(
            {"mesh": MeshConfig(data=1, pipeline=2, fsdp=2, tensor=2), "model.remat": "full"},
            marks=pytest.mark.slow,
            id="pipeline, fsdp, tensor, remat",
        ),
        pytest.param({"mesh": MeshConfig(data=2, context=4)}, marks=pytest.mark.slow, id="context 4"),
        pytest.param(
            {"mesh": MeshConfig(data=1, fsdp=2, tensor=2, context=2), "model.remat": "dots"},
            marks=pytest.mark.slow,
            id="context, fsdp, tensor, remat",
        ),
        pytest.param({"mesh": MeshConfig(data=1, pipeline=2, context=2)}, marks=pytest.mark.slow, id="pipeline, context"),
        pytest.param({"model.remat": "full"}, marks=pytest.mark.slow, id="remat"),
    ],
)
def test_a_divided_step_is_that_of_one_device(changes, alone):
    found = two_steps(looked_at(changes))
    assert_same_training(found, alone)
    for got, want in zip(found[2], alone[2], strict=True):
        assert int(got["optimizer/clipped_heads"]) == int(want["optimizer/clipped_heads"])

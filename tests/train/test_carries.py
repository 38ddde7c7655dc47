"""What layers leave for others, on every mesh axis: the losses, gradients and updates of one device."""

import dataclasses

import pytest

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.models.channel_mixers.mlp import MLPConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.hgrn2 import HGRN2Config
from plait.tests.train.common import changed, tiny
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps

MESHES = {
    "pipeline 2 x context 2 x tensor 2": {"data": 1, "pipeline": 2, "context": 2, "tensor": 2},
    "data 2 x fsdp 2 x context 2": {"data": 2, "fsdp": 2, "context": 2},
    **{f"{axis} 2": {"data": 1, axis: 2} for axis in ("pipeline", "data", "fsdp", "context", "tensor")},
}
SHORT = ("pipeline 2 x context 2 x tensor 2", "data 2 x fsdp 2 x context 2")


def sharing(remat: str | None = None) -> ExperimentConfig:
    """Two periods of a layer that mixes its values with the first one's and leaves them, and one that takes them."""
    softmax = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    mixers = {
        "softmax/writer": SoftmaxConfig(**softmax, value_residual=True, shared_kv="write"),
        "softmax/reader": SoftmaxConfig(**softmax, shared_kv="read"),
    }
    model = dataclasses.replace(tiny().model, pattern="softmax/writer,softmax/reader", num_layers=4, mixers=mixers, remat=remat)
    return changed(dataclasses.replace(tiny(), model=model), {**SIZES, "optimizer.accumulate": 2})


@pytest.fixture(scope="module")
def alone(compile_cache):
    return two_steps(sharing())


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in MESHES])
def test_carries_train_as_on_one_device(name, alone):
    assert_same_training(two_steps(dataclasses.replace(sharing(), mesh=MeshConfig(**MESHES[name]))), alone)


def test_recomputed_carries_train_the_same(alone):
    assert_same_training(two_steps(sharing(remat="full")), alone)


def bounded() -> ExperimentConfig:
    """Layers that read what the model holds for all of them, with MLPs that read the token before."""
    mixers = {"hgrn2": HGRN2Config(head_dim=4, lower_bounds="model")}
    mlp = MLPConfig(hidden_dim=32, token_shift=True)
    changes = {"pattern": "hgrn2", "num_layers": 4, "mixers": mixers, "channel_mixer": mlp, "embedding_norm": True}
    model = dataclasses.replace(tiny().model, **changes)
    return changed(dataclasses.replace(tiny(), model=model), {**SIZES, "optimizer.accumulate": 2})


@pytest.mark.parametrize("name", SHORT[:1])
def test_what_the_model_leaves_trains_as_on_one_device(name, compile_cache):
    assert_same_training(two_steps(dataclasses.replace(bounded(), mesh=MeshConfig(**MESHES[name]))), two_steps(bounded()))

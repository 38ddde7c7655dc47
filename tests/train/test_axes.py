"""Mixers and presets, made small, on the axes of the mesh: the losses, gradients and updates of one device.

The default suite has a mixer of each family base on the axes that cut depth, time and heads; that every mixer has one device's outputs
and gradients on eight is in its contract. The slow suite has every mixer and preset on every axis and pair of axes.
"""

import dataclasses
import functools
import itertools

import pytest

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MESH_AXES, MeshConfig
from plait.configs.presets import presets
from plait.models.channel_mixers.moe import MoEConfig
from plait.models.mixers.base import MIXERS, MixerConfig, WrapperConfig
from plait.tests.suites import usually
from plait.tests.train.common import changed, hybrid, tiny
from plait.tests.train.test_mesh import SIZES, assert_same_training, two_steps

STEP = {**SIZES, "optimizer.accumulate": 2}
AXES = [axis for axis in MESH_AXES if axis != "expert"]  # to these models one more data axis: see test_experts
MESHES = [axes for count in (1, 2) for axes in itertools.combinations(AXES, count)]
COVER = [
    ("pipeline", "data", "fsdp"),
    ("pipeline", "context", "tensor"),
    ("data", "context", "tensor"),
    ("fsdp", "context", "tensor"),
]
"""Every pair of axes is in one of these."""


def small(config: ExperimentConfig) -> ExperimentConfig:
    """A preset's pattern, options and losses: narrow, of two periods and in float32, with the data and optimizer of the tests."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "window_size": 8, "chunk_size": 4}
    experts = {"num_experts": 4, "top_k": 2}

    def narrow(mixer, head_dim=8):
        if isinstance(mixer, WrapperConfig):
            return dataclasses.replace(mixer, mixer=narrow(mixer.mixer))
        if hasattr(mixer, "parts"):  # as wide together as a state-space part beside them
            return dataclasses.replace(mixer, parts=tuple(narrow(part, 16) for part in mixer.parts))
        fields = {field.name for field in dataclasses.fields(mixer) if getattr(mixer, field.name) is not None}
        return dataclasses.replace(
            mixer, **{name: size for name, size in {**sizes, "head_dim": head_dim}.items() if name in fields}
        )

    _, period, _ = config.model.periods
    model = {
        "d_model": 32,
        "num_layers": config.model.num_layers if "@" in config.model.pattern else 2 * period,
        "mixers": {name: narrow(mixer) for name, mixer in config.model.mixers.items()},
        **({} if config.model.channel_mixer is None else {"channel_mixer.hidden_dim": 48}),
        **(
            {f"channel_mixer.{name}": size for name, size in experts.items()}
            if isinstance(config.model.channel_mixer, MoEConfig)
            else {}
        ),
        "vocab_size": None,
        "compute_dtype": "float32",
        "param_dtype": "float32",
    }
    task = {} if config.model.causal else {"data.task": config.data.task}
    return changed(tiny(STEP), {**task, "model": changed(config.model, {**model, "z_loss": 1e-3})})


def layers_of(mixer: MixerConfig) -> ExperimentConfig:
    """A small model of two layers of one mixer."""
    name = f"{mixer.name}+{mixer.mixer.name}" if isinstance(mixer, WrapperConfig) else mixer.name
    model = dataclasses.replace(tiny().model, d_model=64, pattern=name, mixers={name: mixer})
    return changed(dataclasses.replace(tiny(), model=model), STEP)


def on(axes: tuple[str, ...], **options) -> MeshConfig:
    return MeshConfig(**{"data": 1, **dict.fromkeys(axes, 2), **options})


@functools.cache
def alone(config: ExperimentConfig):
    return two_steps(config)


def assert_same_on(config: ExperimentConfig, mesh: MeshConfig) -> None:
    assert_same_training(two_steps(dataclasses.replace(config, mesh=mesh)), alone(config))


FAMILIES = ("softmax", "gla", "gated_deltanet")
"""A mixer of each family base."""

SMALL = {small(preset()): name for name, preset in reversed(presets().items())}
"""Presets that differ once they are small, by the first one's name."""


@pytest.mark.parametrize("axes", COVER[:2], ids=" x ".join)
def test_three_axes_train_as_one_device(axes, compile_cache):
    assert_same_on(tiny({**STEP, "model.tie_embeddings": True}), on(axes, zero=True))


@pytest.mark.slow
@pytest.mark.parametrize("axes", COVER, ids=" x ".join)
def test_hybrid_on_three_axes_trains_as_one_device(axes, compile_cache):
    assert_same_on(hybrid({**STEP, "model.num_layers": 4}), on(axes, zero=True))


@pytest.mark.parametrize("name", usually(FAMILIES, "gla"))
def test_mixer_on_three_axes_trains_as_one_device(name, compile_cache):
    assert_same_on(layers_of(MIXERS[name].example()), on(("pipeline", "context", "tensor"), zero=True))


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=" x ".join)
@pytest.mark.parametrize("mixer", MIXERS.all().values(), ids=MIXERS.all())
def test_mixer_on_one_and_two_axes_trains_as_one_device(mixer, axes, compile_cache):
    assert_same_on(layers_of(mixer.example()), on(axes))


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=" x ".join)
@pytest.mark.parametrize("config", SMALL, ids=SMALL.get)
def test_preset_on_one_and_two_axes_trains_as_one_device(config, axes, compile_cache):
    assert_same_on(config, on(axes))

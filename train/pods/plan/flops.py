"""Operations of a training step by kind of layer."""

from __future__ import annotations

import collections
import dataclasses

from plait.configs.experiment import ExperimentConfig
from plait.train.pipeline import bubble_fraction


@dataclasses.dataclass(frozen=True)
class LayerFlops:
    """A kind of layer, over all layers of the kind. Forward operations per token, 2 per multiply-add."""

    name: str
    count: int
    products: float
    """In products with weights."""
    mixing: float
    """Between tokens."""
    recomputed: float
    """Of both, what the backward pass computes again."""

    @property
    def forward(self) -> float:
        return self.products + self.mixing


def layer_flops(config: ExperimentConfig) -> list[LayerFlops]:
    """The layers of a model with a settled vocabulary, as `LMConfig.flops` counts them; what is recomputed follows `model.remat`."""
    model, seq_len = config.model, config.data.seq_len
    layers = [_layer(config, name, count) for name, count in collections.Counter(model.layers).items()]
    mixers = model.layer_channel_mixers
    channel = sum(one.flops(model.d_model) for one in mixers)
    layers.append(LayerFlops("channel mixers", len(mixers), channel, 0.0, channel if model.remat == "full" else 0.0))
    head = 2.0 * model.d_model * (model.vocab_size or 0)
    layers.append(LayerFlops("head and loss", 1, head, 0.0, head))  # the loss keeps no logits
    assert abs(sum(layer.forward for layer in layers) - model.flops(seq_len)) <= 1e-6 * model.flops(seq_len)
    return layers


def _layer(config: ExperimentConfig, name: str, count: int) -> LayerFlops:
    model = config.model
    mixer = model.mixers[name]
    mixing = count * mixer.between_flops(model.d_model, config.data.seq_len)
    products = count * mixer.flops(model.d_model, config.data.seq_len) - mixing
    again = {"full": products + mixing, "dots": mixing, None: 0.0}[model.remat]
    return LayerFlops(name, count, products, mixing, again)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of a step on one device."""

    model: float
    """Forward and backward, counted as three times the forward pass: what MFU is about."""
    hardware: float
    """With what is computed again, and in the idle ticks of a pipeline."""


def step_flops(config: ExperimentConfig, num_devices: int) -> StepFlops:
    """A step's operations, divided evenly over the devices."""
    layers = layer_flops(config)
    tokens = config.data.batch_size * config.data.seq_len / num_devices
    model = 3 * tokens * sum(layer.forward for layer in layers)
    idle = bubble_fraction(config.mesh.pipeline, config.optimizer.accumulate)
    return StepFlops(model, (model + tokens * sum(layer.recomputed for layer in layers)) / (1 - idle))

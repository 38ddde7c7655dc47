"""Mixers that can take the place of softmax attention, and what each inherits of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from plait.models.mixers.base import MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.deltanet import DeltaNetConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.linear.hedgehog import HedgehogConfig
from plait.models.mixers.linear.kda import KDAConfig
from plait.models.mixers.linear.lolcats import LoLCATsConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.positions.rotary import RotaryConfig

QKVO = {name: name for name in "qkvo"}
_OF_WINDOWS = ("window_size", "num_sink_tokens")
"""What takes part in which weights attention has, of which the student has its own."""


@dataclasses.dataclass(frozen=True)
class Student:
    """How a mixer follows softmax attention."""

    config: Callable[[SoftmaxConfig, int], MixerConfig]
    """That of the student of an attention in a model of a width: as many heads, as wide. Raises ValueError where there is none."""
    inherits: Mapping[str, str] | None
    """Its projections by those of the teacher that they begin as, heads of keys and values repeated where it has more; None: whatever is
    called the same."""
    trains: Literal["new", "all"]
    """What attention transfer trains of it: see `TransferConfig`."""


def _lolcats(teacher: SoftmaxConfig, d_model: int) -> MixerConfig:
    known = {field.name for field in dataclasses.fields(LoLCATsConfig)}
    shared = {}
    for field in dataclasses.fields(SoftmaxConfig):
        value = getattr(teacher, field.name)
        if field.name in _OF_WINDOWS:
            continue
        if field.name in known:
            shared[field.name] = value
        elif value != field.default:
            raise ValueError(
                f"lolcats has no {field.name}, which the attention has ({value!r}); use another mixer for this layer"
            )
    return LoLCATsConfig(**shared, feature_dim=min(LoLCATsConfig.feature_dim, teacher.head_dim))


def _hedgehog(teacher: SoftmaxConfig, d_model: int) -> MixerConfig:
    positions = teacher.positions
    if not (positions is None or (type(positions) is RotaryConfig and positions == RotaryConfig(theta=positions.theta))):
        raise ValueError(f"hedgehog has plain rotary positions or none, not those of the attention ({positions}); use lolcats")
    theta = None if positions is None else positions.theta
    return HedgehogConfig(num_heads=teacher.heads(d_model)[0], head_dim=teacher.head_dim, rope_theta=theta)


def _of_heads(schema: Callable[..., MixerConfig], **options: float) -> Callable[[SoftmaxConfig, int], MixerConfig]:
    return lambda teacher, d_model: schema(num_heads=teacher.heads(d_model)[0], head_dim=teacher.head_dim, **options)


def _gla(teacher: SoftmaxConfig, d_model: int) -> MixerConfig:
    heads = teacher.heads(d_model)[0]
    share = heads * teacher.head_dim / d_model
    return GLAConfig(num_heads=heads, expand_k=share, expand_v=share)


def _mamba2(teacher: SoftmaxConfig, d_model: int) -> MixerConfig:
    heads, dim = teacher.heads(d_model)[0], teacher.head_dim
    return Mamba2Config(expand=heads * dim / d_model, head_dim=dim, state_dim=dim, num_groups=heads)


STUDENTS: Mapping[str, Student] = {
    "lolcats": Student(_lolcats, None, "new"),
    "hedgehog": Student(_hedgehog, QKVO, "new"),
    "gla": Student(_gla, QKVO, "all"),
    "deltanet": Student(_of_heads(DeltaNetConfig), QKVO, "all"),
    "gated_deltanet": Student(_of_heads(GatedDeltaNetConfig, expand_v=1.0), QKVO, "all"),
    "kda": Student(_of_heads(KDAConfig), QKVO, "all"),
    "mamba2": Student(_mamba2, {"C": "q", "B": "k", "x": "v", "o": "o"}, "all"),
}
"""By mixer. As attention, Mamba-2 has queries C, keys B and values x (arXiv 2408.15237)."""

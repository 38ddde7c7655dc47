"""Mamba layers as several families have them: their fields, by names of the family's own, and their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType as Fixed
from typing import Any, TypeVar

from plait.models.config import LMConfig
from plait.models.hf.base import Layer, Line, Unfit
from plait.models.hf.transforms import Fused, FusedTaps, Transposed
from plait.models.hf.values import Values
from plait.models.mixers.base import MixerConfig
from plait.models.mixers.heads import expansion
from plait.models.mixers.linear.mamba1 import Mamba1Config
from plait.models.mixers.linear.mamba2 import Mamba2Config

Kind = TypeVar("Kind", bound=MixerConfig)
NO_LIMIT = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])
"""That the time step has no limit, as older and newer files write it."""
OF_TRAINING = (
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
)
"""Fields that say how new layers begin, in what dtype a bfloat16 model adds, or by what program it is computed."""
SHORT_KEYS = Fixed(
    {
        "num_heads": "num_heads",
        "head_dim": "head_dim",
        "state_dim": "state_size",
        "num_groups": "n_groups",
        "dt_rank": "time_step_rank",
        "conv_size": "conv_kernel",
        "conv_bias": "use_conv_bias",
        "use_bias": "use_bias",
        "expand": "expand",
        "chunk_size": "chunk_size",
    }
)
"""Fields of families that have nothing but Mamba layers, by those here."""
KEYS = Fixed(
    {
        "num_heads": "mamba_n_heads",
        "head_dim": "mamba_d_head",
        "state_dim": "mamba_d_state",
        "num_groups": "mamba_n_groups",
        "dt_rank": "mamba_dt_rank",
        "conv_size": "mamba_d_conv",
        "conv_bias": "mamba_conv_bias",
        "use_bias": "mamba_proj_bias",
        "expand": "mamba_expand",
        "chunk_size": "mamba_chunk_size",
    }
)
"""Fields of most hybrids."""


def first_of(model: LMConfig, kind: type[Kind]) -> Kind:
    """The mixer of the first layer of a kind. Raises Unfit where there is none."""
    for mixer in model.layer_mixers:
        if type(mixer) is kind:
            return mixer
    raise Unfit(f"no layer is {kind.name}")


def read_mamba1(
    values: Values, width: int, keys: Mapping[str, str] = SHORT_KEYS, *, inner: int | None = None, **options: Any
) -> Mamba1Config:
    """The mixer that the fields `keys` describe, with `options` beside them.

    Args:
        width: of the stream.
        inner: of the mixer, where it is not `expand` times that.
    """
    values.passed_over(OF_TRAINING)
    rank, expand = values(keys["dt_rank"], (int, str), "auto"), values(keys["expand"], int, 2)
    return Mamba1Config(
        expand=expansion(expand * width if inner is None else inner, width),
        state_dim=values(keys["state_dim"], int, 16),
        dt_rank=-(-width // 16) if isinstance(rank, str) else rank,
        conv_size=values(keys["conv_size"], int, 4),
        use_bias=values(keys["use_bias"], bool, False),
        conv_bias=values(keys["conv_bias"], bool, True),
        **options,
    )


def write_mamba1(mixer: Mamba1Config, width: int, keys: Mapping[str, str] = SHORT_KEYS) -> dict[str, Any]:
    """The fields `keys` of a mixer. Raises Unfit where its inner width is no whole number of times the stream's."""
    return {
        keys["expand"]: whole_expand(mixer.expand),
        keys["state_dim"]: mixer.state_dim,
        keys["dt_rank"]: mixer.rank(width),
        keys["conv_size"]: mixer.conv_size,
        keys["use_bias"]: mixer.use_bias,
        keys["conv_bias"]: mixer.conv_bias,
    }


def mamba1_lines(layer: Layer, name: str, mixer: Mamba1Config, width: int) -> Iterator[Line]:
    """The lines of a mixer that is `name` there."""
    inner, rank = mixer.width(width), mixer.rank(width)
    yield from layer.fused(f"{name}.in_proj", ("mixer.x", "mixer.z"), Fused((inner, inner)), bias=mixer.use_bias)
    yield from _conv(layer, f"{name}.conv1d", ("mixer.conv",), (inner,), bias=mixer.conv_bias)
    parts = ("mixer.dt_down", "mixer.B", "mixer.C")
    yield from layer.fused(f"{name}.x_proj", parts, Fused((rank, mixer.state_dim, mixer.state_dim)))
    yield from layer.dense(f"{name}.dt_proj", "mixer.dt_up")
    yield layer.same(f"{name}.dt_proj.bias", "mixer.dt_bias", float32=True)
    yield layer.line(f"{name}.A_log", "mixer.A_log", Transposed(), float32=True)
    yield layer.same(f"{name}.D", "mixer.D", float32=True)
    if mixer.norm_scale:
        for part in ("dt", "B", "C"):
            yield layer.same(f"{name}.{part.lower()}_layernorm.weight", f"mixer.{part}_norm.scale")
    yield from layer.dense(f"{name}.out_proj", "mixer.o", bias=mixer.use_bias)


def read_mamba2(
    values: Values, width: int, keys: Mapping[str, str] = KEYS, *, inner: int | None = None, **options: Any
) -> Mamba2Config:
    """The mixer that the fields `keys` describe, with `options` beside them.

    Args:
        width: of the stream.
        inner: of the mixer, where it is not `expand` times that.
    """
    values.passed_over((keys["chunk_size"], *OF_TRAINING))
    values.only("time_step_limit", *NO_LIMIT)
    heads, expand = values(keys["num_heads"], int, 128), values(keys["expand"], int, 2)
    inner = expand * width if inner is None else inner
    head_dim = values(keys["head_dim"], (int, str), "auto")
    head_dim = inner // heads if isinstance(head_dim, str) else head_dim
    if heads * head_dim != inner:
        raise Unfit(f"config.json: {keys['num_heads']}={heads} heads of {head_dim} channels are not the mixer's {inner}")
    return Mamba2Config(
        expand=expansion(inner, width),
        head_dim=head_dim,
        state_dim=values(keys["state_dim"], int),
        num_groups=values(keys["num_groups"], int),
        conv_size=values(keys["conv_size"], int, 4),
        use_bias=values(keys["use_bias"], bool, False),
        conv_bias=values(keys["conv_bias"], bool, True),
        **options,
    )


def write_mamba2(mixer: Mamba2Config, width: int, keys: Mapping[str, str] = KEYS) -> dict[str, Any]:
    """The fields `keys` of a mixer, but for `expand`."""
    return {
        keys["num_heads"]: mixer.num_heads(width),
        keys["head_dim"]: mixer.head_dim,
        keys["state_dim"]: mixer.state_dim,
        keys["num_groups"]: mixer.num_groups,
        keys["conv_size"]: mixer.conv_size,
        keys["use_bias"]: mixer.use_bias,
        keys["conv_bias"]: mixer.conv_bias,
    }


def whole_expand(expand: float) -> int:
    """It as a whole number. Raises Unfit where it is none."""
    if expand != int(expand):
        raise Unfit(f"expand={expand} is no whole number")
    return int(expand)


def mamba2_lines(layer: Layer, name: str, mixer: Mamba2Config, width: int) -> Iterator[Line]:
    """The lines of a mixer that is `name` there."""
    heads = mixer.num_heads(width)
    inner, shared = heads * mixer.head_dim, mixer.num_groups * mixer.state_dim
    parts = tuple(f"mixer.{part}" for part in ("z", "x", "B", "C", "dt"))
    yield from layer.fused(f"{name}.in_proj", parts, Fused((inner, inner, shared, shared, heads)), bias=mixer.use_bias)
    convs = tuple(f"mixer.{part}_conv" for part in ("x", "B", "C"))
    yield from _conv(layer, f"{name}.conv1d", convs, (inner, shared, shared), bias=mixer.conv_bias)
    for own in ("A_log", "dt_bias", "D"):
        yield layer.same(f"{name}.{own}", f"mixer.{own}", float32=True)
    if mixer.norm is not None:
        yield layer.same(f"{name}.norm.weight", "mixer.norm.scale")
    yield from layer.dense(f"{name}.out_proj", "mixer.o", bias=mixer.use_bias)


def _conv(layer: Layer, name: str, paths: tuple[str, ...], sizes: tuple[int, ...], *, bias: bool) -> Iterator[Line]:
    """Those of a short convolution that is several here."""
    yield layer.line(f"{name}.weight", tuple(f"{path}.weight" for path in paths), FusedTaps(sizes))
    if bias:
        yield layer.line(f"{name}.bias", tuple(f"{path}.bias" for path in paths), Fused(sizes))

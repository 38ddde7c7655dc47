"""Rotary embeddings as configs write them: `rope_parameters`, or in older files `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

from plait.models.hf.base import Unfit
from plait.models.hf.values import Values
from plait.models.hf.windows import WINDOW
from plait.models.positions.base import PositionConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_linear import LinearRotaryConfig
from plait.models.positions.rotary_llama3 import Llama3RotaryConfig
from plait.models.positions.rotary_proportional import ProportionalRotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig


def read_rope(
    values: Values,
    *,
    max_len: int,
    key: str | None = None,
    default_theta: float = 10_000.0,
    default_fraction: float = 1.0,
    older: Mapping[str, str] = types.MappingProxyType({}),
    passed_over: Sequence[str] = (),
) -> RotaryConfig:
    """The rotary embedding of a config; of a kind of layer where `key` names one and the config tells them apart.

    Args:
        max_len: the longest sequence of the model.
        default_theta: base of the frequencies where the config does not say.
        default_fraction: share of a head that is turned where the config does not say.
        older: names of the family's own for `rope_theta` and `partial_rotary_factor` in older files.
        passed_over: parameters that say nothing of text.

    Raises:
        Unfit: of a type that there is not here.
    """
    parameters = values("rope_parameters", dict, None)
    field = lambda name, default: values(older.get(name, name), float, values(name, float, default))
    theta, scaling = field("rope_theta", default_theta), values("rope_scaling", dict, {})
    fraction = field("partial_rotary_factor", default_fraction)
    if parameters is None:
        parameters = {"rope_theta": theta, **scaling}
    if key is not None and key in parameters:
        parameters = parameters[key]
    elif key == WINDOW:  # older files: stretched where all is seen, plain where a window is
        parameters = {"rope_theta": parameters.get("rope_theta", theta)}
    given = {"rope_theta": theta, "partial_rotary_factor": fraction, **parameters}
    fields = Values(given)
    fields.passed_over(passed_over)
    kind = fields("rope_type", str, fields("type", str, "default"))
    common = {"theta": fields("rope_theta", float, 10_000.0), "fraction": fields("partial_rotary_factor", float, 1.0)}
    found = _read(kind, common, fields, max_len)
    fields.finish()
    return found


def _read(kind: str, common: Mapping[str, Any], fields: Values, max_len: int) -> RotaryConfig:
    if kind == "default":
        fields.passed_over(("factor", "original_max_position_embeddings"))
        return RotaryConfig(**common)
    if kind == "linear":
        return LinearRotaryConfig(**common, factor=fields("factor", float))
    if kind == "proportional":
        fields.only("factor", 1.0)
        return ProportionalRotaryConfig(**common)
    if kind == "llama3":
        return Llama3RotaryConfig(
            **common,
            factor=fields("factor", float),
            original_len=fields("original_max_position_embeddings", int),
            low_frequency=fields("low_freq_factor", float),
            high_frequency=fields("high_freq_factor", float),
        )
    if kind == "yarn":
        original = fields("original_max_position_embeddings", int, max_len)
        return YarnRotaryConfig(
            **common,
            factor=fields("factor", float),
            original_len=original,
            beta_fast=fields("beta_fast", float, 32.0),
            beta_slow=fields("beta_slow", float, 1.0),
            truncate=fields("truncate", bool, True),
            attention_factor=fields("attention_factor", float, None),
        )
    raise Unfit(
        f"config.json: rope_type={kind!r} is not supported; 'default', 'linear', 'proportional', 'llama3' or 'yarn' can be used"
    )


def write_rope(positions: PositionConfig | None, *, interleaved: bool = False) -> dict[str, Any]:
    """The `rope_parameters` of a rotary embedding. Raises Unfit for positions that are none.

    Args:
        interleaved: whether its pairs are neighbours.
    """
    if not isinstance(positions, RotaryConfig) or positions.interleaved != interleaved:
        raise Unfit(
            f"positions={getattr(positions, 'name', None)!r} are no rotary embedding {'of neighbours' if interleaved else 'in halves'}"
        )
    found: dict[str, Any] = {"rope_theta": positions.theta, "rope_type": "default"}
    if positions.fraction != 1:
        found["partial_rotary_factor"] = positions.fraction
    if isinstance(positions, LinearRotaryConfig):
        found |= {"rope_type": "linear", "factor": positions.factor}
    elif isinstance(positions, ProportionalRotaryConfig):
        found["rope_type"] = "proportional"
    elif isinstance(positions, Llama3RotaryConfig):
        found |= {
            "rope_type": "llama3",
            "factor": positions.factor,
            "original_max_position_embeddings": positions.original_len,
            "low_freq_factor": positions.low_frequency,
            "high_freq_factor": positions.high_frequency,
        }
    elif isinstance(positions, YarnRotaryConfig):
        found |= {
            "rope_type": "yarn",
            "factor": positions.factor,
            "original_max_position_embeddings": positions.original_len,
        }
        plain = YarnRotaryConfig()
        for name in ("beta_fast", "beta_slow", "truncate", "attention_factor"):
            if getattr(positions, name) != getattr(plain, name):
                found[name] = getattr(positions, name)
    elif type(positions) is not RotaryConfig:
        raise Unfit(f"positions={positions.name!r} have no name there")
    return found

"""How far gates are open, and whether they still move."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from plait.models.looks.look import GateValues
from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean
from plait.train.probes.statistic import Panel, Statistic

_NEAR = 0.01
_SECTION = "Gates"
_KINDS = {
    "output": ("output gate", "what multiplies the heads before the output projection"),
    "decay": ("decay gate", "what a state is multiplied by at each token, 1 keeps all"),
    "write": ("write gate", "the strength beta with which the delta rule writes"),
}


def _statistics(kind: str) -> tuple[Statistic, Statistic]:
    title, meaning = _KINDS[kind]
    return (
        Statistic(
            name=f"{kind}_gate",
            per="head",
            unit="|gate|",
            meaning=f"mean size of the {title}, {meaning}",
            panel=Panel(title=title.capitalize(), section=_SECTION, lines=True),
        ),
        Statistic(
            name=f"{kind}_gate_saturated",
            per="head",
            unit="share of gates",
            meaning=f"share of {title}s within {_NEAR:g} of 0 or, where they have a largest value, within that share of it",
            panel=Panel(title=f"{kind.capitalize()} gate saturated", section=_SECTION, lines=True, limits=(0, 1), compared=False),
        ),
    )


@register("gates", source="Gated Attention (2505.06708); Gated Linear Attention (2312.06635)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates(Probe):
    """Sizes of gates that mixers tell, over tokens and channels; padding is left out."""

    by_default = False
    statistics = tuple(one for kind in _KINDS for one in _statistics(kind))

    def measure(self, look, config):
        real = (look.at.segment_ids > 0)[:, :, None, None]
        found = {}
        for kind, gate in look.observed.get("gates", {}).items():
            size, saturated = _sizes(gate)
            found[f"{kind}_gate"] = masked_mean(size, real, axis=(0, 1, 3))
            found[f"{kind}_gate_saturated"] = masked_mean(saturated.astype(jnp.float32), real, axis=(0, 1, 3))
        return found


def _sizes(gate: GateValues) -> tuple[jax.Array, jax.Array]:
    """Sizes of gates and whether they are at an end, `[B, T, H, C]`."""
    size = jnp.abs(gate.values.astype(jnp.float32))
    size = size.reshape(*size.shape[:3], -1)
    if gate.largest is None:
        return size, size < _NEAR
    share = size / gate.largest
    return size, (share < _NEAR) | (share > 1 - _NEAR)

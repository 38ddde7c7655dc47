"""Whether the values of first tokens are drained."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean, start_ratio
from plait.train.probes.statistic import Panel, Statistic


@register("value_drain", source="Active-Dormant Attention Heads (2410.13835)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueDrain(Probe):
    """Norms of values at document starts against those elsewhere."""

    statistics = (
        Statistic(
            name="value_drain",
            per="head",
            unit="‖v₀‖ / mean ‖vⱼ‖",
            meaning="mean |v| at document starts over mean |v| elsewhere; far below 1 for sink heads",
            panel=Panel(title="Value drain", section="Extreme values", lines=True, low_is_dark=True),
        ),
        Statistic(
            name="value_norm",
            per="head",
            unit="‖v‖",
            meaning="mean |v| of tokens that begin no document",
            panel=Panel(title="Value norm", section="Extreme values", lines=True, compared=False),
        ),
    )

    def measure(self, look, config):
        if look.mixer is None:
            return {}
        norms = jnp.linalg.norm(look.inputs.v.astype(jnp.float32), axis=-1)
        drain = start_ratio(norms, look.at.segment_ids, look.at.positions)  # [Hkv]
        rest = (look.at.segment_ids > 0) & (look.at.positions > 0)
        size = masked_mean(norms, rest[..., None], axis=(0, 1))
        group = look.mixer.num_heads // drain.shape[0]
        return {"value_drain": jnp.repeat(drain, group), "value_norm": jnp.repeat(size, group)}

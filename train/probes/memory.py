"""What states remember."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean
from plait.train.probes.statistic import Metric, Panel, Statistic

SECTION = "Memory of the linear layers"


@register("memory", source="here; the statistics of the recurrence kernels")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Probe):
    """Horizon, writes and size of the states of linear heads; padding is left out."""

    statistics = (
        Statistic(
            name="decay_horizon",
            per="head",
            unit="tokens",
            meaning="tokens after which the state has decayed by e, 1 / mean(-g)",
            metric=Metric(name="attn/decay_horizon", reduce=np.nanmedian, meaning="median over heads and layers"),
            panel=Panel(title="Decay horizon", section=SECTION, lines=True, map=True, log=True),
        ),
        Statistic(
            name="write_strength",
            per="head",
            unit="norm of a write to the state",
            meaning="mean Frobenius norm of one token's write to the state",
            panel=Panel(title="Write strength", section=SECTION, lines=True, map=True),
        ),
        Statistic(
            name="state_norm",
            per="head",
            unit="Frobenius norm",
            meaning="Frobenius norm of the state at the end of the sequence",
            panel=Panel(title="State norm", section=SECTION, lines=True, compared=False),
        ),
    )

    def measure(self, look, config):
        stats = look.observed.get("recurrence")
        if stats is None:
            return {}
        weight = stats.num_tokens / jnp.maximum(stats.num_tokens.sum((0, 1)), 1.0)[None, None, :]  # [B, spans, H]
        real = (look.at.segment_ids > 0).any(1)[:, None]
        return {
            "decay_horizon": 1.0 / jnp.maximum((weight / stats.decay_horizon).sum((0, 1)), 1e-9),
            "write_strength": (stats.write_strength * weight).sum((0, 1)),
            "state_norm": masked_mean(jnp.linalg.norm(look.observed["memory"], axis=(-2, -1)), real, axis=0),
        }

    def summary(self, run):
        horizon = run.by_head("decay_horizon")
        if horizon is None or not np.isfinite(horizon[-1]).any():
            return None
        low, middle, high = np.nanpercentile(horizon[-1], (0, 50, 100))
        return f"Linear heads forget over {low:.3g} to {high:.3g} tokens at the end, {middle:.3g} in the median."

"""What states remember."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, Statistic, register
from plait.train.probes.means import masked_mean


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
            metric=("attn/decay_horizon", np.nanmedian),
        ),
        Statistic(
            name="write_strength",
            per="head",
            unit="norm of a write to the state",
            meaning="mean Frobenius norm of one token's write to the state",
        ),
        Statistic(
            name="state_norm",
            per="head",
            unit="Frobenius norm",
            meaning="Frobenius norm of the state at the end of the sequence",
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

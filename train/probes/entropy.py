"""How broad attention is."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, Statistic, register
from plait.train.probes.means import masked_mean, weights


@register("entropy", source="sigmaReparam (2303.06296), section 2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy(Probe):
    """Entropy of query rows: exact and of every row where the mixer tells it, of the looked-at rows of implied attention elsewhere."""

    statistics = (
        Statistic(name="entropy", per="head", unit="nats", meaning="mean over queries", metric=("attn/entropy_mean", np.nanmean)),
        Statistic(
            name="entropy_ratio",
            per="head",
            unit="share of log n",
            meaning="entropy over log(visible positions of the document), mean over queries that see two or more",
            metric=("attn/entropy_ratio", np.nanmean),
        ),
    )

    def measure(self, look, config):
        segment_ids, positions = look.at.segment_ids, look.at.positions
        if (exact := look.observed.get("attention")) is not None:
            entropy, axes = exact.entropy, (0, 1)  # [B, T, H]
            real, position = (segment_ids > 0)[:, :, None], positions[:, :, None]
        elif look.implied is not None:
            a, axes = weights(look.implied), (0, 2)
            entropy = -(a * jnp.log(a + 1e-6)).sum(-1)  # [B, H, R]
            real, position = (segment_ids[:, look.rows] > 0)[:, None, :], positions[:, look.rows][:, None, :]
        else:
            return {}
        ratio = entropy / jnp.log(jnp.maximum(position, 1).astype(jnp.float32) + 1.0)
        return {
            "entropy": masked_mean(entropy, real, axis=axes),
            "entropy_ratio": masked_mean(ratio, real & (position > 0), axis=axes),
        }

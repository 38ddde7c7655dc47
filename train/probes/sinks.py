"""How much attention the first tokens of a document get."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, Statistic, register
from plait.train.probes.means import masked_mean, weights

THRESHOLD = 0.3
"""alpha_1 above which a head counts as a sink (arXiv 2410.10781)."""


@register("sinks", source="When Attention Sink Emerges in Language Models (2410.10781), section 3, per document here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinks(Probe):
    """alpha_k, on the looked-at rows; alpha_1 of every row where the mixer tells it."""

    statistics = (
        Statistic(
            name="sink",
            per="head",
            unit="share",
            meaning="alpha_k: mean weight on the document's k-th token by the queries after it",
            size=lambda config: config.first_k,
        ),
        Statistic(
            name="sink_rate",
            per="head",
            unit="share of sequences",
            meaning=f"share of sequences with alpha_1 above {THRESHOLD}",
            metric=("attn/sink_rate", np.nanmean),
        ),
    )

    def measure(self, look, config):
        if look.implied is None:
            return {}
        segment_ids, positions = look.at.segment_ids, look.at.positions
        row_segment, row_position = segment_ids[:, look.rows], positions[:, look.rows]  # [B, R]
        document = row_segment[:, :, None] == segment_ids[:, None, :]  # [B, R, S]
        k = jnp.arange(config.first_k)
        starts = document[:, None] & (positions[:, None, None, :] == k[None, :, None, None])  # [B, K, R, S]
        received = jnp.einsum("bhrs,bkrs->bhkr", weights(look.implied), starts.astype(jnp.float32))
        real = (row_segment > 0)[:, None, :]
        sees = real[:, :, None, :] & (row_position[:, None, None, :] >= k[None, None, :, None])  # [B, 1, K, R]
        sink, first = masked_mean(received, sees, axis=(0, 3)), masked_mean(received, sees, axis=-1)[:, :, 0]
        if (exact := look.observed.get("attention")) is not None:
            every = (segment_ids > 0)[:, :, None]
            sink = sink.at[:, 0].set(masked_mean(exact.first_mass, every, axis=(0, 1)))
            first, real = masked_mean(exact.first_mass, every, axis=1), every.swapaxes(1, 2)
        return {"sink": sink, "sink_rate": masked_mean((first > THRESHOLD).astype(jnp.float32), real.any(-1), axis=0)}

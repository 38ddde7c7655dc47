"""The sink rate as it is published, so that its numbers compare."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.first_tokens import TOKENS, begins_whole, first_maps
from plait.train.probes.means import masked_mean
from plait.train.probes.sinks import THRESHOLD, is_sink
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("sink_k_eps", source="When Attention Sink Emerges in Language Models (2410.10781), section 3, equation 3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkKEps(Probe):
    """The published sink rate: of the first 64 tokens of each probed sequence that begins with so long a piece, all rows."""

    by_default = False
    title = "Sink rate as published"
    statistics = (
        Statistic(
            name="sink_k_eps",
            per="head",
            unit="% of sequences",
            meaning=f"probed sequences in whose first {TOKENS} tokens the k-th gets more than {THRESHOLD} of the attention of the queries from "
            "it on; sequences that begin with a shorter piece of a document are left out",
            size=lambda config: config.first_k,
            metric=Metric(
                name="attn/sink_k_eps",
                reduce=lambda values: np.nanmean(values[..., 0]),
                meaning="of the first token, mean over heads and layers, as published",
            ),
            panel=Panel(title="Sink₁ as published", section="Attention over training", limits=(0, 100), compared=False),
        ),
    )

    def measure(self, look, config):
        maps, index = first_maps(look), jnp.arange(TOKENS)
        if maps is None:
            return {}
        sees = (index[:, None] >= index[None, : config.first_k]).astype(jnp.float32)  # [queries, K]
        alpha = (maps[..., : config.first_k] * sees[None, None]).sum(2) / sees.sum(0)[None, None]  # [B, H, K]
        whole = begins_whole(look)
        rate = masked_mean(is_sink(alpha).astype(jnp.float32), whole[:, None, None], axis=0)
        return {"sink_k_eps": jnp.where(whole.any(), 100 * rate, jnp.nan)}

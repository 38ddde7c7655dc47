"""How many tokens attention is anchored to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.first_tokens import TOKENS, begins_whole, first_maps
from plait.train.probes.means import masked_mean
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Reference frame"


@register("reference_frame", source="What Are You Sinking? (2508.02546): its kinds of frames; the measure is of here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceFrame(Probe):
    """What the first 64 tokens give to each other: one anchor is a centralised frame, two at the ends a bidirectional one, several a
    distributed one."""

    by_default = False
    statistics = (
        Statistic(
            name="anchors",
            per="head",
            unit="tokens",
            meaning=f"the exponential of the entropy of what each of the first {TOKENS} tokens gets of all their attention: of how many "
            "tokens it is, mean over sequences",
            metric=Metric(name="attn/anchors", reduce=np.nanmedian, meaning="median over heads and layers"),
            panel=Panel(title="Anchors", section=_SECTION, map=True, lines=True, limits=(1, TOKENS), low_is_dark=True),
        ),
        Statistic(
            name="anchor_share",
            per="head",
            unit="share",
            meaning="what the token that gets most has of it, mean over sequences",
            panel=Panel(title="Largest anchor", section=_SECTION, lines=True, most=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        maps = first_maps(look)
        if maps is None:
            return {}
        received = maps.sum(-2)  # [B, H, S]
        share = received / jnp.maximum(received.sum(-1, keepdims=True), 1e-30)
        number, whole = jnp.exp(-jax.scipy.special.xlogy(share, share).sum(-1)), begins_whole(look)
        mean = lambda x: jnp.where(whole.any(), masked_mean(x, whole[:, None], axis=0), jnp.nan)
        return {"anchors": mean(number), "anchor_share": mean(share.max(-1))}

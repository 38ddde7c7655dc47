"""Whether layers make tokens alike."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import longest, masked_mean
from plait.train.probes.ranks import effective_rank
from plait.train.probes.statistic import Metric, Panel, Statistic

_TOKENS = 64  # of a document, evenly spaced
_SECTION = "Representations"


@register("representations", source="What Happens During the Loss Plateau? (2506.13688); the effective rank (EUSIPCO 2007)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Representations(Probe):
    """How alike tokens of a document are in the residual stream after the block, and in how many directions they lie."""

    by_default = False
    statistics = (
        Statistic(
            name="token_similarity",
            per="layer",
            unit="cosine",
            meaning=f"mean cosine of pairs among at most {_TOKENS} evenly spaced tokens of each sequence's longest document, its first token "
            "left out, in the residual stream after the block: 1 is collapse",
            metric=Metric(name="residual/similarity", reduce=lambda of_layers: of_layers[-1], meaning="after the last layer"),
            panel=Panel(title="Token similarity", section=_SECTION, lines=True, most=True),
        ),
        Statistic(
            name="token_rank",
            per="layer",
            unit="directions",
            meaning="effective rank of the same tokens: exp of the entropy of their singular values; low where layers mix tokens to one",
            metric=Metric(name="residual/rank", reduce=np.nanmin, meaning="of the layer with the lowest"),
            panel=Panel(title="Token rank", section=_SECTION, lines=True),
        ),
    )

    def measure(self, look, config):
        start, length = longest(look.at)
        every = jnp.arange(_TOKENS)[None] * jnp.maximum(length - 1, _TOKENS)[:, None] // _TOKENS
        there = every < length[:, None] - 1
        index = jnp.where(there, start[:, None] + 1 + every, 0)
        x = jnp.take_along_axis(look.residual.astype(jnp.float32), index[..., None], axis=1)
        x = jnp.where(there[..., None], x, 0.0)
        norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
        unit = x / jnp.where(norms > 0, norms, 1.0)
        count = there.sum(1)
        cosines = jnp.square(unit.sum(1)).sum(-1) - jnp.square(unit).sum((1, 2))  # of ordered pairs
        mean = lambda values, told: jnp.where(told.any(), masked_mean(values, told, axis=0), jnp.nan)
        return {
            "token_similarity": mean(cosines / jnp.maximum(count * (count - 1), 1), count > 1),
            "token_rank": mean(effective_rank(x), count > 0),
        }

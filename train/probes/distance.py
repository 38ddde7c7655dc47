"""How far back heads look."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import looked_at, upto, weights
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Distance of attention"
RANGES = 12
"""Ranges of lags and positions: 0, 1, 2 and 3, 4 to 7, and so on; the last has all beyond."""


@register("distance", source="WAAD's heads (2510.13554); positional heads (1905.09418); lag curves (Howard and Kahana 1999)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance(Probe):
    """The looked-at rows' weights by how far back they look, and by where in its document a token stands."""

    by_default = False
    title = "Distance of attention"
    statistics = (
        Statistic(
            name="attention_distance",
            per="head",
            unit="tokens",
            meaning="mean over queries of the tokens between query and key, by their weight",
            metric=Metric(name="attn/distance", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Attention distance", section=_SECTION, lines=True, map=True),
        ),
        Statistic(
            name="far_share",
            per="head",
            unit="share",
            meaning="weight on tokens at least `probe.far` back, mean over queries that have so many before them in their document; the "
            "rest is local",
            metric=Metric(name="attn/far_share", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Far share", section=_SECTION, map=True, limits=(0, 1)),
        ),
        Statistic(
            name="offset_share",
            per="head",
            unit="share",
            meaning="mean weight on the one token so far back as gives most; near 1 in a positional head",
            panel=Panel(title="Offset share", section=_SECTION, map=True, limits=(0, 1)),
        ),
        Statistic(
            name="offset",
            per="head",
            unit="tokens",
            meaning="how far back the token of `offset_share` is; 0 is the query itself",
        ),
        Statistic(
            name="lag_curve",
            per="head",
            unit="mean weight of a token",
            meaning="mean weight of a token by how far back it is: 0, 1, 2 and 3, 4 to 7, ..., the last entry all beyond",
            size=lambda config: RANGES,
            panel=Panel(title="Weight on itself", section=_SECTION, by_entry="Weight by lag", log=True, compared=False),
        ),
        Statistic(
            name="primacy_curve",
            per="head",
            unit="mean weight of a token",
            meaning="the same by the token's position in its document, over the queries after it",
            size=lambda config: RANGES,
            panel=Panel(title="Weight on the first", section=_SECTION, by_entry="Weight by position", log=True, compared=False),
        ),
    )

    def measure(self, look, config):
        if look.implied is None:
            return {}
        index, pairs = jnp.arange(look.x.shape[1]), upto(look)  # [S], [B, R, S]
        lag = look.rows[:, None] - index[None, :]  # [R, S]
        a = weights(look.implied) * pairs[:, None]  # [B, H, R, S]
        weight, number = _sums(a.sum(0), lag), _sums(pairs.sum(0)[None], lag)  # [H, T], [1, T]
        real = number[:, :1]  # every row sees itself
        share = weight / jnp.maximum(real, 1.0)  # [H, T]
        told = lambda value, rows: jnp.where(rows > 0, value, jnp.nan)
        have = looked_at(look, config.far).sum()
        after = pairs & (lag > 0)[None]
        received = jnp.moveaxis((a * after[:, None]).sum(2), 1, 0)  # [H, B, S]
        return {
            "attention_distance": told((share * index[None]).sum(-1), real[0]),
            "far_share": told((weight * (index >= config.far)[None]).sum(-1) / jnp.maximum(have, 1), have),
            "offset_share": told(share.max(-1), real[0]),
            "offset": told(share.argmax(-1).astype(jnp.float32), real[0]),
            "lag_curve": _by_range(weight, number),
            "primacy_curve": _by_range(_sums(received, look.at.positions), _sums(after.sum(1)[None], look.at.positions)),
        }


def _sums(x: jax.Array, number: jax.Array) -> jax.Array:
    """`[N, S]`: the sums of `x` `[N, ..., S]` over the places where `number` `[..., S]` is 0, 1, ..., S - 1."""
    flat = x.astype(jnp.float32).reshape(x.shape[0], -1)
    return jax.ops.segment_sum(flat.T, jnp.maximum(number.reshape(-1), 0), num_segments=x.shape[-1]).T


def _by_range(weight: jax.Array, number: jax.Array) -> jax.Array:
    """Mean weights `[H, RANGES]` in doubling ranges, of sums of weights and numbers of pairs by lag or position; NaN in empty ones."""
    index = jnp.arange(weight.shape[-1])
    place = jnp.minimum(32 - jax.lax.clz(index.astype(jnp.int32)), RANGES - 1)  # of 0 it is 0, of 1 it is 1, of 2 and 3 it is 2
    weight, number = (jax.ops.segment_sum(x.T, place, num_segments=RANGES).T for x in (weight, number))
    return jnp.where(number > 0, weight / jnp.maximum(number, 1.0), jnp.nan)

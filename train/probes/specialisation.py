"""Whether the heads of a layer do different things, and whether all of them do something."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import looked_at, masked_mean, mean_of_rows, off_sink, weights
from plait.train.probes.statistic import Metric, Panel, Statistic

ALIKE = 0.05
"""Divergence in bits below which two heads count as alike; chosen here."""
_SECTION = "Specialisation of heads"


@register(
    "specialisation", source="Attention Sink Forges Native MoE in Attention Layers (2602.01203): the sink as a gate of its head"
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Specialisation(Probe):
    """What each head gives to other tokens than the sink, how evenly a layer's heads do, and how much their rows differ."""

    by_default = False
    statistics = (
        Statistic(
            name="head_gate",
            per="head",
            unit="share",
            meaning="mean weight that is not on the document's first token nor on a sink logit, by queries after the first: what the head's "
            "values come to",
            panel=Panel(title="Head gate", section=_SECTION, map=True, limits=(0, 1)),
        ),
        Statistic(
            name="gate_imbalance",
            per="layer",
            unit="deviation over mean",
            meaning="standard deviation of the heads' `head_gate` over its mean: 0 where all heads give alike, large where few do all",
            metric=Metric(name="attn/gate_imbalance", reduce=np.nanmax, meaning="of the most uneven layer"),
            panel=Panel(title="Imbalance of gates", section=_SECTION, lines=True, most=True),
        ),
        Statistic(
            name="head_divergence",
            per="head",
            unit="bits",
            meaning="mean Jensen-Shannon divergence of the head's rows from those of each other head of the layer: 0 the same, 1 apart",
            metric=Metric(name="attn/head_divergence", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(title="Divergence of heads", section=_SECTION, map=True, limits=(0, 1), low_is_dark=True),
        ),
        Statistic(
            name="alike_heads",
            per="layer",
            unit="share of heads",
            meaning=f"heads that another of the layer is less than {ALIKE} bits from",
            panel=Panel(title="Heads alike", section=_SECTION, lines=True, most=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        gates, told = off_sink(look), looked_at(look)
        if gates is None:
            return {}
        gate = mean_of_rows(gates, told)
        found = {"head_gate": gate, "gate_imbalance": gate.std() / jnp.maximum(gate.mean(), 1e-6)}
        if (heads := gate.shape[0]) > 1:
            divergence = jnp.where(told.any(), _divergence(weights(look.implied), told), jnp.nan)
            others = ~jnp.eye(heads, dtype=bool)
            alike = jnp.where(others, divergence, jnp.inf).min(-1) < ALIKE
            found["head_divergence"] = masked_mean(divergence, others, axis=-1)
            found["alike_heads"] = jnp.where(told.any(), alike.mean(), jnp.nan)
        return found


def _divergence(a: jax.Array, told: jax.Array) -> jax.Array:
    """Mean Jensen-Shannon divergence in bits of each two heads' rows, `[H, H]`, over the rows `told`."""
    entropy = lambda p: -jax.scipy.special.xlogy(p, p).sum(-1) / jnp.log(2.0)
    own = entropy(a)

    def of(head: tuple[jax.Array, jax.Array]) -> jax.Array:  # one head at a time: there is no array of pairs of rows
        row, its = head
        between = entropy((a + row[:, None]) / 2) - (own + its[:, None]) / 2
        return masked_mean(jnp.maximum(between, 0.0), told[:, None], axis=(0, 2))

    return jax.lax.map(of, (jnp.moveaxis(a, 1, 0), jnp.moveaxis(own, 1, 0)))

"""What later layers are made of, if each layer mixes tokens as its attention says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.first_tokens import TOKENS, begins_whole, first_maps
from plait.train.probes.means import masked_mean
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Attention rollout"


def with_residual(attention: jax.Array) -> jax.Array:
    """What each token of a layer's output is made of, `[..., T, T]`, of its attention: half of it is the token itself."""
    mixed = attention + jnp.broadcast_to(jnp.eye(attention.shape[-1]), attention.shape)
    return mixed / mixed.sum(-1, keepdims=True)


@register("rollout", source="Quantifying Attention Flow in Transformers (2005.00928)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Probe):
    """Rolled-out attention of the last of the first 64 tokens, of sequences that begin with so long a piece of a document."""

    by_default = False
    statistics = (
        Statistic(
            name="rollout_first",
            per="layer",
            unit="share",
            meaning=f"what the last of the first {TOKENS} tokens has of the first, in attention rolled out up to the layer",
            panel=Panel(title="First token in the rollout", section=_SECTION, lines=True, limits=(0, 1)),
        ),
        Statistic(
            name="rollout_tokens",
            per="layer",
            unit="tokens",
            meaning="of how many tokens it is made: the exponential of the entropy of its row",
            metric=Metric(
                name="attn/rollout_tokens",
                reduce=lambda values: values[np.isfinite(values)][-1],
                meaning="of the last layer that has one",
            ),
            panel=Panel(title="Tokens in the rollout", section=_SECTION, lines=True),
        ),
    )

    def measure(self, look, config):
        return {}

    def parts(self, looks, config):
        maps = [one for one in map(first_maps, looks) if one is not None]
        return {"map": jnp.concatenate(maps, axis=1).mean(1), "whole": begins_whole(looks[0])} if maps else {}

    def across(self, layers, config):
        found: list[dict[str, jax.Array]] = []
        rolled = jnp.eye(TOKENS)[None]
        for part in layers:
            if not part:
                break  # what a layer without attention mixes is not known, nor what comes after it
            rolled = with_residual(part["map"]) @ rolled
            row = rolled[:, -1]
            tokens = jnp.exp(-jax.scipy.special.xlogy(row, row).sum(-1))
            mean = lambda x, whole=part["whole"]: jnp.where(whole.any(), masked_mean(x, whole, axis=0), jnp.nan)
            found.append({"rollout_first": mean(row[:, 0]), "rollout_tokens": mean(tokens)})
        return found + [{}] * (len(layers) - len(found))

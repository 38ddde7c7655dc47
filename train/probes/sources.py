"""Probes that tell the sources of a mixture apart."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from plait.configs.probe import ProbeConfig
from plait.models.looks.look import Look
from plait.train.probes.base import Probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceProbe(Probe):
    """Means of each source's looked-at sequences: a row of a mixture is of one source. A run without sources has none of its statistics."""

    by_default = False

    @abc.abstractmethod
    def sums(self, look: Look, config: ProbeConfig) -> jax.Array | None:
        """Of each looked-at sequence and head the sum of what is averaged and how many it is over, float32 `[B, H, 2]`; None without heads
        that have it."""

    @abc.abstractmethod
    def conclude(self, means: jax.Array) -> Mapping[str, jax.Array]:
        """The statistics of a layer from the means of heads by source, `[H, S]`, NaN of a source of which nothing was looked at."""

    def measure(self, look, config):
        return {}

    def parts(self, looks, config):
        found = [self.sums(look, config) for look in looks]
        if all(one is None for one in found):
            return {}
        nothing = lambda look: jnp.zeros((look.x.shape[0], 0 if look.mixer is None else look.mixer.num_heads, 2))
        return {
            "sums": jnp.concatenate([nothing(look) if one is None else one for look, one in zip(looks, found, strict=True)], 1)
        }

    def by_source(self, layers: Sequence[Mapping[str, jax.Array]], of: jax.Array) -> list[Mapping[str, jax.Array]]:
        """The statistics of each layer, of its parts.

        Args:
            layers: the parts of each.
            of: which source each looked-at sequence is of, bool `[B, S]`.
        """
        return [self.conclude(_means(part["sums"], of)) if part else {} for part in layers]


def _means(sums: jax.Array, of: jax.Array) -> jax.Array:
    """Of sequences `[B, H, 2]`, by source `[H, S]`."""
    total = jnp.where(of[:, None, :, None], sums[:, :, None], 0).sum(0)
    return jnp.where(total[..., 1] > 0, total[..., 0] / jnp.maximum(total[..., 1], 1), jnp.nan)

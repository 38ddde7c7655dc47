"""Attention of the first tokens of sequences, all rows, for probes that need whole maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.models.looks.look import Look
from plait.train.probes.means import shares

TOKENS = 64
"""How many: the length of the published sequences of sinks (arXiv 2410.10781)."""


def first_maps(look: Look) -> jax.Array | None:
    """Shares `[B, H, TOKENS, TOKENS]` of the first tokens' attention; None where rows are shorter or the mixer has none."""
    if look.mixer is None or look.x.shape[1] < TOKENS:
        return None
    implied = look.mixer.implied(look.inputs, jnp.arange(TOKENS), at=look.at)
    return None if implied is None else shares(look, implied)[..., :TOKENS]


def begins_whole(look: Look) -> jax.Array:
    """bool `[B]`: which sequences begin with a piece of a document that has so many tokens."""
    segments = look.at.segment_ids[:, :TOKENS]
    return (segments[:, 0] > 0) & (segments == segments[:, :1]).all(1)

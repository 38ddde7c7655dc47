"""Extremes of the residual stream."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, Statistic, register
from plait.train.probes.means import masked_mean, start_ratio


@register("residual", source="Massive Activations (2402.17762); residual peaks (2410.13835)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(Probe):
    """The largest entries of the residual stream after the block, and how far first tokens stand out."""

    statistics = (
        Statistic(
            name="residual_top",
            per="layer",
            unit="|x|",
            meaning="three largest |x| of the residual stream after the block, mean over sequences",
            size=lambda config: 3,
            metric=("residual/max", np.nanmax),
        ),
        Statistic(name="residual_median", per="layer", unit="|x|", meaning="median |x| of the residual stream"),
        Statistic(
            name="residual_peak",
            per="layer",
            unit="‖x₀‖ / mean ‖xⱼ‖",
            meaning="|x| at document starts over |x| elsewhere",
        ),
    )

    def measure(self, look, config):
        segment_ids, x = look.at.segment_ids, jnp.abs(look.residual.astype(jnp.float32))
        real = segment_ids > 0
        stride = max(1, x.shape[1] // 64)
        sample = jnp.where(real[:, ::stride, None], x[:, ::stride], jnp.nan)
        norms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))
        top = _largest_three(jnp.where(real[:, :, None], x, 0.0))
        return {
            "residual_top": masked_mean(top, real.any(1)[:, None], axis=0),
            "residual_median": jnp.nan_to_num(jnp.nanmedian(sample)),
            "residual_peak": start_ratio(norms, segment_ids, look.at.positions),
        }


def _largest_three(x: jax.Array) -> jax.Array:
    """The three largest entries of each x[i], `[B, 3]`, by maxima and counts alone: sorting would gather sharded axes."""
    axes = tuple(range(1, x.ndim))
    first = x.max(axes, keepdims=True)
    second = jnp.where(x < first, x, -jnp.inf).max(axes, keepdims=True)
    third = jnp.where(x < second, x, -jnp.inf).max(axes, keepdims=True)
    ones, twos = ((x == value).sum(axes, keepdims=True) for value in (first, second))
    two = jnp.where(ones > 1, first, second)
    three = jnp.where(ones > 2, first, jnp.where(ones + twos > 2, second, third))
    return jnp.concatenate([value.reshape(-1, 1) for value in (first, two, three)], axis=1)

"""Extremes of the residual stream."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean, start_ratio
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Extreme values"
_SAMPLE = 16  # tokens of a row


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
            metric=Metric(name="residual/max", reduce=np.nanmax, meaning="the largest of all layers"),
            panel=Panel(title="Largest |x|", section=_SECTION, lines=True, most=True, log=True),
        ),
        Statistic(
            name="residual_norm",
            per="layer",
            unit="root mean square",
            meaning="root mean square of the residual stream after the block, mean over tokens that begin no document",
            panel=Panel(title="Norm", section=_SECTION, lines=True, log=True),
        ),
        Statistic(
            name="residual_median",
            per="layer",
            unit="|x|",
            meaning=f"median |x| of the residual stream after the block, of an even sample of {_SAMPLE} tokens a sequence, padding left out",
        ),
        Statistic(
            name="residual_peak",
            per="layer",
            unit="‖x₀‖ / mean ‖xⱼ‖",
            meaning="root mean square of the residual stream at document starts over that elsewhere",
            panel=Panel(title="First-token norm", section=_SECTION, lines=True, most=True, log=True),
        ),
    )

    def measure(self, look, config):
        segment_ids, x = look.at.segment_ids, jnp.abs(look.residual.astype(jnp.float32))
        real = segment_ids > 0
        norms = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))
        top = _largest_three(jnp.where(real[:, :, None], x, 0.0))
        return {
            "residual_top": masked_mean(top, real.any(1)[:, None], axis=0),
            "residual_norm": masked_mean(norms, real & (look.at.positions > 0), axis=(0, 1)),
            "residual_median": absolute_median(x, real),
            "residual_peak": start_ratio(norms, segment_ids, look.at.positions),
        }

    def summary(self, run):
        top, median = run.by_head("residual_top"), run.by_head("residual_median")
        if top is None or median is None or not np.isfinite(top[-1]).any():
            return None
        layer = int(np.nanargmax(top[-1, :, 0]))
        largest, usual = top[-1, layer, 0], median[-1, layer, 0]
        times = largest / usual if usual > 0 else np.inf
        return f"The largest |x| at the end is {largest:,.3g} after layer {layer}, {times:,.{0 if times >= 10 else 1}f} times the median."


def absolute_median(x: jax.Array, real: jax.Array) -> jax.Array:
    """The median of |x|, `[B, T, D]` float32, over an even sample of each row's tokens that are `real` `[B, T]`, 16 of them or all where
    there are fewer; 0 where there is none.

    The middle entries are found by counts alone, which halve the range of bit patterns: sorting takes several times as long, and would
    gather sharded axes."""
    count, every = real.sum(1)[:, None], jnp.arange(_SAMPLE)[None]
    number = every * jnp.maximum(count, _SAMPLE) // _SAMPLE  # among the real tokens of the row
    upto = jnp.cumsum(real, axis=1)[:, None]
    place = jnp.argmax(upto > number[..., None], axis=-1)
    x, most = jnp.take_along_axis(x, place[..., None], axis=1), jnp.iinfo(jnp.int32).max
    there = (every < count)[..., None] & ~jnp.isnan(x)
    bits = jnp.where(there, jax.lax.bitcast_convert_type(x, jnp.int32), most)  # in the order of what is not negative
    count = there.sum()

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = 2 * (bits <= middle).sum() >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    lower, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(most)))
    upper = jnp.where(2 * (bits <= lower).sum() > count, lower, jnp.where(bits > lower, bits, most).min())
    ends = jax.lax.bitcast_convert_type(jnp.stack([lower, upper]), jnp.float32)
    return jnp.where(count > 0, 0.5 * ends[0] + 0.5 * ends[1], 0.0)


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

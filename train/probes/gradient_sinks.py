"""Gradient sinks: tokens in which the gradient of the residual stream gathers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import GradientProbe, register
from plait.train.probes.means import by_document
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Gradients by token"
_FEWEST_TOKENS = 32  # of a document whose largest share is counted: of few, each has a large one


@register("gradient_sinks", source="Attention Sinks Induce Gradient Sinks (2603.17771); measures of its own here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSinks(GradientProbe):
    """Norms, token by token, of the gradient of the loss by the residual stream after each block."""

    by_default = False
    place, width = "residual", 7
    statistics = (
        Statistic(
            name="gradient_start",
            per="layer",
            unit="‖∂L/∂x₀‖ / mean ‖∂L/∂xⱼ‖",
            meaning="mean norm of the gradient of the residual stream after the block at document starts over that elsewhere",
            metric=Metric(name="grad/start", reduce=np.nanmax, meaning="the largest of all layers"),
            panel=Panel(title="Gradient at first tokens", section=_SECTION, lines=True, most=True, log=True),
        ),
        Statistic(
            name="gradient_largest",
            per="layer",
            unit="share of the document's",
            meaning="norm at the token where it is largest over the sum of the document's norms, mean over documents of at least "
            f"{_FEWEST_TOKENS} tokens; of n tokens, 1/n is even",
            metric=Metric(name="grad/largest_share", reduce=np.nanmax, meaning="the largest of all layers"),
            panel=Panel(title="Largest share of one token", section=_SECTION, lines=True, most=True),
        ),
        Statistic(
            name="gradient_largest_is_first",
            per="layer",
            unit="share of documents",
            meaning="of those documents, in how many the first token is where the norm is largest",
            panel=Panel(title="Where the first token has the largest", section=_SECTION, lines=True, limits=(0, 1)),
        ),
    )

    def read(self, gradient, x, at):
        norms = jnp.sqrt(jnp.square(gradient.astype(jnp.float32)).sum(-1))  # [B, T]
        real, start, documents = at.segment_ids > 0, at.positions == 0, at.numbered()
        largest_of = functools.partial(jax.ops.segment_max, num_segments=documents.shape[1] + 1)
        largest = jax.vmap(largest_of)(norms, documents)[:, 1:]
        lengths, total = (by_document(a, documents) for a in (jnp.ones(norms.shape), norms))
        first = by_document(jnp.where(start, norms, 0.0), documents)
        counts = (lengths >= _FEWEST_TOKENS) & (total > 0)
        share = largest / jnp.where(total > 0, total, 1.0)
        found = [(norms, real & start), (norms, real & ~start), (share, counts), (first >= largest, counts)]
        one, other, shares, at_first = (jnp.where(mask, values, 0.0).sum() for values, mask in found)
        sizes = [mask.sum(dtype=jnp.float32) for _, mask in found[:3]]
        return jnp.stack([one, sizes[0], other, sizes[1], shares, at_first, sizes[2]])

    def conclude(self, sums):
        one, starts, other, others, shares, at_first, documents = sums
        over = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), jnp.nan)
        return {
            "gradient_start": over(over(one, starts), over(other, others)),
            "gradient_largest": over(shares, documents),
            "gradient_largest_is_first": over(at_first, documents),
        }

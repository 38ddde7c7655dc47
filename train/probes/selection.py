"""What queries choose to see: how much of their attention it keeps, how alike choices of heads and neighbours are, how far back and how
evenly they lie."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import SelectedBlocks, Tokens
from plait.models.looks.look import Look, Selection
from plait.train.probes.base import Probe, register
from plait.train.probes.means import mean_of_rows, upto
from plait.train.probes.statistic import Metric, Panel, Statistic

SECTION = "Selection"
NEIGHBOURS = 128
"""Queries, or as many as a block has tokens where those are more."""


@register(
    "selection",
    source="MoBA (2502.13189), NSA (2502.11089): what block selection is to keep; overlap, entropy and spread of choices here",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionProbe(Probe):
    """The tokens that a mixer's queries choose, of looked-at rows that leave tokens out; of mixers that tell a `Selection`."""

    statistics = (
        Statistic(
            name="selection_kept",
            per="head",
            unit="share",
            meaning="what the chosen tokens have of attention to all that the mask shows, with the same logits",
            metric=Metric(name="selection/kept", reduce=np.nanmean, meaning="mean over heads and layers that choose"),
            panel=Panel(title="Attention kept", section=SECTION, map=True, limits=(0, 1), low_is_dark=True),
        ),
        Statistic(
            name="selection_overlap",
            per="head",
            unit="share",
            meaning="chosen tokens in common over those of either, mean over the layer's other choices; none where its heads choose together",
            metric=Metric(name="selection/overlap", reduce=np.nanmean, meaning="mean over heads and layers that choose apart"),
            panel=Panel(title="Overlap between heads", section=SECTION, lines=True, limits=(0, 1)),
        ),
        Statistic(
            name="selection_age",
            per="head",
            unit="tokens",
            meaning="how far back of the query the chosen tokens stand, on average",
            metric=Metric(name="selection/age", reduce=np.nanmean, meaning="mean over heads and layers that choose"),
            panel=Panel(title="Age of what is chosen", section=SECTION, lines=True),
        ),
        Statistic(
            name="selection_entropy",
            per="head",
            unit="share of log n",
            meaning="entropy of how often each token of a row is chosen, over that of even use: 0 where all queries choose one",
            metric=Metric(name="selection/entropy", reduce=np.nanmean, meaning="mean over heads and layers that choose"),
            panel=Panel(title="Entropy of what is chosen", section=SECTION, lines=True, limits=(0, 1)),
        ),
        Statistic(
            name="selection_spread",
            per="head",
            unit="times",
            meaning=f"blocks that {NEIGHBOURS} neighbours, or as many as a block has tokens, choose together over how many one of them "
            "chooses: what kernels compute over what was chosen; none where tokens are chosen one by one",
            metric=Metric(name="selection/spread", reduce=np.nanmean, meaning="mean over heads and layers that choose blocks"),
            panel=Panel(title="Blocks of neighbours over those of one", section=SECTION, lines=True),
        ),
    )

    def measure(self, look, config):
        if (selection := told(look)) is None:
            return {}
        seen, past = chosen(look, selection), upto(look)
        rows = leaves_out(seen, past)
        heads = look.mixer.num_heads
        each = lambda values: jnp.repeat(values, heads // values.shape[0])  # heads of a group choose together
        dense = selection.dense(look.rows)
        kept = (dense * jnp.repeat(seen, heads // seen.shape[1], axis=1)).sum(-1) / jnp.maximum(dense.sum(-1), 1e-30)
        back = (look.at.positions[:, look.rows, None] - look.at.positions[:, None, :])[:, None]
        age = jnp.where(seen, back, 0).sum(-1) / jnp.maximum(seen.sum(-1), 1)
        return {
            "selection_kept": mean_of_rows(kept, rows),
            "selection_overlap": None if seen.shape[1] == 1 else each(mean_of_rows(_overlap(seen), rows)),
            "selection_age": each(mean_of_rows(age, rows)),
            "selection_entropy": each(_entropy(seen & rows[:, None, :, None], past & rows[:, :, None])),
            "selection_spread": None if selection.blocks.block_size == 1 else each(_spread(selection.blocks, look.at)),
        }

    def summary(self, run):
        kept = run.by_head("selection_kept")
        if kept is None or not np.isfinite(kept[-1]).any():
            return None
        there = np.isfinite(kept[-1]).any(-1)
        without = [layer["mixer"] for layer, chooses in zip(run.layers, there, strict=True) if not chooses and "mixer" in layer]
        last = kept[-1][np.isfinite(kept[-1])]
        text = f"What queries choose keeps {np.median(last):.0%} of their attention (median of heads; least {last.min():.0%})."
        return text + (
            f" {', '.join(dict.fromkeys(without))} have none: they choose nothing by scores, or all there is." if without else ""
        )


def told(look: Look) -> Selection | None:
    """The look's selection; None where the mixer chooses nothing, or here all."""
    return look.observed.get("selection")


def chosen(look: Look, selection: Selection) -> jax.Array:
    """bool `[B, Hs, R, S]`: the tokens that each looked-at row sees."""
    rows = dataclasses.replace(selection.blocks, indices=selection.blocks.indices[:, look.rows])
    return rows.shown(look.at.positions) & upto(look)[:, None]


def leaves_out(seen: jax.Array, past: jax.Array) -> jax.Array:
    """bool `[B, R]`: the rows of which some head does not see all `past` `[B, R, S]`."""
    return (past[:, None] & ~seen).any((1, 3))


def _overlap(seen: jax.Array) -> jax.Array:
    """`[B, Hs, R]`: tokens in common with another choice over those of either, the mean over the others."""
    x = seen.astype(jnp.float32)
    both = jnp.einsum("bhrs,bgrs->brhg", x, x, precision="highest")
    count = jnp.moveaxis(x.sum(-1), 1, 2)  # [B, R, Hs]
    ratio = both / jnp.maximum(count[..., :, None] + count[..., None, :] - both, 1)
    heads = seen.shape[1]
    others = (ratio.sum(-1) - jnp.diagonal(ratio, axis1=-2, axis2=-1)) / (heads - 1)
    return jnp.moveaxis(others, 2, 1)


def _entropy(seen: jax.Array, past: jax.Array) -> jax.Array:
    """`[Hs]`, the mean over sequences; NaN where none has a row that tells."""
    count = seen.astype(jnp.float32).sum(2)  # [B, Hs, S]
    p = count / jnp.maximum(count.sum(-1, keepdims=True), 1)
    entropy = -jax.scipy.special.xlogy(p, p).sum(-1)
    most = past.any(1).sum(-1)  # [B]
    ratio = entropy / jnp.log(jnp.maximum(most, 2).astype(jnp.float32))[:, None]
    return mean_of_rows(jnp.moveaxis(ratio, 0, -1)[None], (most > 1)[None])


def _spread(blocks: SelectedBlocks, at: Tokens) -> jax.Array:
    """`[Hs]`, the mean over runs of neighbours of which some leave a block out."""
    batch, length, choices, number = blocks.indices.shape
    size = min(length, max(NEIGHBOURS, blocks.block_size))
    runs = lambda x: x[:, : length // size * size].reshape(batch, -1, size, *x.shape[2:])  # [B, N, size, ...]
    own, real = at.positions // blocks.block_size, at.segment_ids > 0
    there = (blocks.indices >= 0) & (blocks.indices <= own[..., None, None]) & real[..., None, None]
    starts = jnp.arange(length, dtype=jnp.int32)[None] - at.positions  # of documents, by which their blocks are told apart
    first = jnp.where(there, starts[..., None, None] + blocks.indices * blocks.block_size, length)
    first = jnp.sort(jnp.moveaxis(runs(first), 3, 2).reshape(batch, -1, choices, size * number), axis=-1)
    new = jnp.concatenate([first[..., :1] < length, (first[..., 1:] > first[..., :-1]) & (first[..., 1:] < length)], axis=-1)
    count = there.sum(-1)  # [B, T, Hs]
    one = runs(count).sum(2) / jnp.maximum(runs(real).sum(2), 1)[..., None]  # [B, N, Hs]
    less = runs(real[..., None] & (count <= own[..., None])).any((2, 3))
    return mean_of_rows(jnp.moveaxis(new.sum(-1) / jnp.maximum(one, 1e-30), 2, 1), less)

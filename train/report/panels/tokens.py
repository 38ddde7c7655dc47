"""A text token by token: what each gets of attention, how large it becomes, and what the last one is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from plait.train.inspection.tokens import TokenByToken
from plait.train.report.panels.attention import token_axes
from plait.train.report.style import AMOUNT_MAP, Picture, blank, colour_bar, panels, picture, run_colour, value_axis

_LABELS = 65


def received(names: Sequence[str], found: Sequence[TokenByToken], told: str) -> Picture:
    """Layer x token of each model: the share that later tokens give to one; `told` ends the caption."""
    norm = Normalize(0, 1)
    caption = (
        "Layer (down) by token (across): the mean share of attention that a later token gives to this one, over the heads of the layer. A "
        "column that stands out is a sink. Of the model without heads it is what the masked heads would give too."
    )
    return _maps("received", names, found, [one.received for one in found], norm, caption + told)


def sizes(names: Sequence[str], found: Sequence[TokenByToken], told: str) -> Picture:
    """Layer x token of each model: the largest entry of the residual stream over the median one."""
    values = [one.largest / np.maximum(one.median, 1e-30)[:, None] for one in found]
    seen = np.stack(values)
    seen = seen[np.isfinite(seen) & (seen > 0)]
    low, high = (seen.min(), seen.max()) if seen.size else (1.0, 1.0)
    caption = (
        "Layer by token: the largest |x| of the residual stream after the layer over the layer's median |x|. Above 1000 (and |x| above 100) an "
        "activation is called massive."
    )
    return _maps("sizes", names, found, values, LogNorm(low, max(high, 2 * low)), caption + told)


def made_of(names: Sequence[str], found: Sequence[TokenByToken], told: str) -> Picture | str:
    """The tokens of which the last one is made, by rollout and by flow."""
    shares = [one.made_of for one in found]
    if not shares[0]:
        return "The first layer has no attention, so what the last token is made of is not known."
    tokens = found[0].names
    figure, axes = panels(2, columns=1, height=1.5, left=0.72, gap=(0, 0.95), margin=(0.36, 0.75))
    width = 0.8 / len(found)
    for ax, name in zip(axes, ("rollout", "flow")):
        for index, own in enumerate(shares):
            ax.bar(np.arange(len(tokens)) + (index - (len(found) - 1) / 2) * width, own[name], width, color=run_colour(index))
        token_axes(ax, tokens, keys=True, queries=False, most=_LABELS)
        ax.set_xlabel("")
        ax.set(title=f"Attention {name}", ylabel="share of the last token", xlim=(-0.6, len(tokens) - 0.4))
        value_axis(ax)
    if len(found) > 1:
        axes[0].legend(list(axes[0].containers), list(names), loc="best")
    caption = (
        "Of what the last token is made, over all layers that have attention, if each mixed tokens by the mean of its heads and a residual "
        "of the same size. Rollout multiplies layers; flow takes them for pipes, whose narrowest part counts."
    )
    return picture("made_of", figure, caption + told)


def _maps(
    name: str, names: Sequence[str], found: Sequence[TokenByToken], values: Sequence[np.ndarray], norm: Normalize, caption: str
) -> Picture:
    height = float(np.clip(0.09 * len(values[0]), 0.8, 4.0))
    figure, axes = panels(len(found), columns=1, height=height, left=0.72, gap=(0, 0.42), margin=(0.42, 0.75))
    for index, (ax, matrix) in enumerate(zip(axes, values)):
        if not np.isfinite(matrix).any():
            blank(ax, "no finite value in this model")
            continue
        image = ax.imshow(matrix, aspect="auto", cmap=AMOUNT_MAP, norm=norm, interpolation="nearest")
        _axes(ax, found[index].names, len(matrix), last=index == len(found) - 1)
        ax.set_title(names[index], fontsize=9)
        colour_bar(ax, image, ticks=_ticks(norm), width=0.16)
    return picture(name, figure, caption)


def _ticks(norm: Normalize) -> list[float]:
    """The powers of ten in a scale, or its ends where there are fewer than two."""
    low, high = norm.vmin or 0.0, norm.vmax or 1.0
    powers = [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)] if low > 0 else []
    return powers if len(powers) > 1 else [low, high]


def _axes(ax: Axes, tokens: Sequence[str], depth: int, *, last: bool) -> None:
    token_axes(ax, tokens, keys=last, queries=False, most=_LABELS)
    layers = range(0, depth, max(1, depth // 8))
    ax.set_yticks(layers, [str(layer) for layer in layers])
    ax.tick_params(axis="y", labelsize=7)
    ax.set_ylabel("layer", fontsize=7.5)
    ax.set_xlabel("")

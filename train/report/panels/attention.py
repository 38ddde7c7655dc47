"""Attention pictures of a few telling heads of every mixer, on the same held-out text."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from plait.train.report.run import Run
from plait.train.report.style import MUTED, SIGNED_MAP, SIGNED_ROOT, Picture, colour_bar, kind_colour, panels, picture

PANELS = 4  # heads shown for each mixer
MARKS = {"\n": "↵", "\t": "→", "\r": "↵", " ": "·"}


def normalise(maps: np.ndarray) -> np.ndarray:
    """Rows divided by their sum of absolute values, so that signed and unnormalised weights are shares of the same total."""
    total = np.nansum(np.abs(maps), -1, keepdims=True)
    return maps / np.where(total > 0, total, 1)


def head_scores(maps: np.ndarray) -> dict[str, np.ndarray]:
    """What makes a head worth a picture, each [L, H] and larger for more so; from normalised maps, first query left out."""
    size = maps.shape[-1]
    exists = np.isfinite(maps[..., np.tri(size, dtype=bool)]).all(-1)
    maps = np.nan_to_num(maps)
    weights = np.abs(maps[..., 1:, :])
    rows, columns = np.arange(1, size)[:, None], np.arange(size)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(np.where(weights > 0, weights * np.log(weights), 0), -1) / np.log(np.arange(2, size + 1))
    distance = (weights * np.maximum(rows - columns, 0)).sum(-1) / np.arange(1, size)
    negative = np.clip(-maps[..., 1:, :], 0, None).sum(-1)
    scores = {
        "most on first": weights[..., 0].mean(-1),
        "most local": 1 - distance.mean(-1),
        "sharpest": 1 - entropy.mean(-1),
        "most negative": negative.mean(-1),
        "broadest": entropy.mean(-1),
    }
    return {name: np.where(exists, score, -np.inf) for name, score in scores.items()}


def choose_heads(scores: dict[str, np.ndarray], layers: Sequence[int], count: int = PANELS) -> list[tuple[int, int, str, float]]:
    """(layer, head, reason, score) of up to `count` different heads among `layers`, the best for each reason in turn."""
    chosen: list[tuple[int, int, str, float]] = []
    for reason, score in scores.items():
        heads = [(layer, head) for layer in layers for head in range(score.shape[1])]
        candidates = [(float(score[place]), *place) for place in heads if np.isfinite(score[place])]
        taken = {(layer, head) for layer, head, *_ in chosen}
        rest = [candidate for candidate in candidates if candidate[1:] not in taken]
        if not rest or (reason == "most negative" and max(rest)[0] < 0.01):
            continue
        value, layer, head = max(rest, key=lambda candidate: candidate[0])
        chosen.append((layer, head, reason, value))
    return chosen[:count]


def pictures(index: int, run: Run, heads: Sequence[tuple[int, int]] = ()) -> Picture | str:
    """For each mixer of the run a row of its most telling heads, or rows of the named ones; queries down and keys across."""
    if run.attention is None:
        return f"{run.name}: no attention pictures were written (probes/attention.npz is missing)."
    maps = normalise(run.attention.maps)
    layers = run.layers[: maps.shape[0]] or [{"mixer": "unknown", "kind": "unknown"}] * maps.shape[0]
    scores = head_scores(maps)
    mixers = dict.fromkeys(layer["mixer"] for layer in layers)
    if heads:
        grid = [row for mixer in mixers for row in _named([one for one in heads if layers[one[0]]["mixer"] == mixer], maps)]
    else:
        grid = [choose_heads(scores, [i for i, layer in enumerate(layers) if layer["mixer"] == mixer]) for mixer in mixers]
    grid = [row for row in grid if row]
    if not grid:
        return f"{run.name}: the attention pictures hold no finite head."
    figure, axes = panels(len(grid) * PANELS, columns=PANELS, height=2.42, left=0.72, gap=(0.2, 0.72), margin=(0.72, 0.62))
    upper = np.triu(np.ones(maps.shape[-2:], bool), 1)
    image = None
    for row, members in enumerate(grid):
        cells = axes[row * PANELS : (row + 1) * PANELS]
        for column, ax in enumerate(cells):
            if column >= len(members):
                ax.set_axis_off()
                continue
            layer, head, reason, score = members[column]
            picture_of = np.where(upper, np.nan, maps[layer, head])
            image = ax.imshow(picture_of, cmap=SIGNED_MAP, norm=SIGNED_ROOT, interpolation="nearest", aspect="auto")
            detail = f" {score:.2f}" if reason in ("most on first", "most negative") else ""
            ax.set_title(f"layer {layer}, head {head}", fontsize=8.5, pad=4)
            ax.text(1, 1.025, reason + detail, transform=ax.transAxes, ha="right", va="bottom", fontsize=7.5, color=MUTED)
            token_axes(ax, run.attention.tokens, keys=row == len(grid) - 1, queries=column == 0)
        mixer = layers[members[0][0]]
        cells[0].text(
            0, 1.14, mixer["mixer"], transform=cells[0].transAxes, color=kind_colour(mixer["kind"]), fontsize=10, weight="bold"
        )
        width = 0.12 + 0.088 * len(mixer["mixer"])
        place = {"transform": cells[0].transAxes, "fontsize": 8.5, "color": MUTED}
        cells[0].text(width / 2.5, 1.14, f"{mixer['kind']} layers", **place)
    bar = colour_bar(axes[PANELS - 1], image, ticks=[-1, -0.25, 0, 0.25, 1], width=0.6, lift=0.36)
    bar.text(-0.04, 0.5, "share of the row", transform=bar.transAxes, ha="right", va="center", fontsize=7.5, color=MUTED)
    step = "" if run.attention.step is None else f" at step {run.attention.step:,}"
    caption = (
        f"Implied attention{step}, each row (query) divided by its sum of absolute weights. "
        "Blue is positive, red negative, pale grey zero; colour grows with the square root of the weight, so weak weights stay "
        "visible. Keys run across, queries down. "
    )
    caption += "" if heads else "The heads shown are the extreme ones of each mixer, not typical ones."
    return picture(f"attention_{index}" if index else "attention", figure, caption)


def _named(heads: Sequence[tuple[int, int]], maps: np.ndarray) -> list[list[tuple[int, int, str, float]]]:
    """Rows of named heads of a mixer, those without attention left out."""
    there = [(layer, head, "", math.nan) for layer, head in heads if np.isfinite(maps[layer, head]).all()]
    return [there[i : i + PANELS] for i in range(0, len(there), PANELS)]


def token_axes(ax: Axes, tokens: Sequence[str], *, keys: bool, queries: bool, most: int = 26) -> None:
    """Token labels as densely as they stay readable, `most` of them; every labelled token is where its tick is."""
    names = [shown(token) for token in tokens]
    stride = max(1, math.ceil(len(names) / most))
    places = list(range(0, len(names), stride))
    for axis, wanted in ((ax.xaxis, keys), (ax.yaxis, queries)):
        axis.set_major_locator(FixedLocator(places))
        axis.set_ticklabels([names[i] for i in places] if wanted else [])
    ax.tick_params(axis="both", labelsize=6, length=0, pad=2)
    ax.tick_params(axis="x", labelrotation=90)
    if keys:
        ax.set_xlabel("key", fontsize=7.5)
    if queries:
        ax.set_ylabel("query", fontsize=7.5)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def shown(token: str, limit: int = 8) -> str:
    """A token as a short label with visible white space."""
    text = "".join(MARKS.get(character, character if character.isprintable() else "□") for character in token)
    return text if len(text) <= limit else text[: limit - 1] + "…"

"""Kinds of layers and their windows, as configs of several families write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plait.models.hf.base import Unfit
from plait.models.hf.values import Values

FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"
OLDER = {
    "attention": FULL,
    "full": FULL,
    "global": FULL,
    "sliding": WINDOW,
    "local": WINDOW,
    "sliding_window": WINDOW,
    "mamba": LINEAR,
}
"""Words for them in older files."""


def read_windows(values: Values, depth: int, default: Sequence[str], window: int | None) -> list[int | None]:
    """The window of each layer by `layer_types`, or `default` where there is none.

    Raises:
        Unfit: a word is unknown, or they are not one a layer.
    """
    words = read_layer_types(values, depth, default, (FULL, WINDOW))
    if WINDOW in words and window is None:
        raise Unfit(f"config.json: layer_types has {WINDOW!r} and sliding_window is null; give the number of tokens")
    return [window if word == WINDOW else None for word in words]


def read_layer_types(values: Values, depth: int, default: Sequence[str], known: Sequence[str]) -> list[str]:
    """The word of each layer, in the newer spelling. Raises Unfit unless each is `known`, and they are one a layer."""
    words = [OLDER.get(word, word) for word in values("layer_types", list, list(default))]
    if len(words) != depth:
        raise Unfit(f"config.json: layer_types has {len(words)} words and num_hidden_layers={depth}; give one a layer")
    for word in words:
        if word not in known:
            raise Unfit(f"config.json: layer_types has {word!r}, which this family has not; {' and '.join(known)} can be used")
    return words


def write_windows(windows: Sequence[int | None]) -> dict[str, Any]:
    """`layer_types` and `sliding_window`. Raises Unfit where windows differ in size."""
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise Unfit(f"windows of {sorted(sizes)} tokens are in one model, and the config has one size")
    words = [FULL if window is None else WINDOW for window in windows]
    return {"layer_types": words, "sliding_window": sizes.pop() if sizes else None}

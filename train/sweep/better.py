"""Whether less of a metric is better, or more."""

from __future__ import annotations

from typing import Literal

Better = Literal["lower", "higher"]
_LOWER = ("loss", "perplexity", "bits_per_byte", "glitch_rate", "error")
"""Ends of the names of metrics of which less is better."""


def better(metric: str) -> Better:
    """Whether a metric is better lower or higher, by its name."""
    group, _, name = metric.rpartition("/")
    return "lower" if group in ("loss", "position") or name.endswith(_LOWER) else "higher"

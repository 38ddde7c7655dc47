"""What an inspection is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from plait.configs.domains import Counted, Heads, Length, Line, Rows, Seed
from plait.configs.probe import ProbeConfig
from plait.train.inspection.needles import NeedleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Of what, on which text, without which heads."""

    text: Path
    """UTF-8 text, cut into rows, of which the first are read."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""
    rows: Rows = 4
    """Rows of the text."""
    length: Length | None = None
    """Tokens of a row; by default those of the run's, at most 512, or the text's where it has fewer."""
    tokens: Line | None = None
    """Tokens of the text that are shown one by one, FIRST:END from 0, at most 64; by default the first ones."""
    heads: Line | None = None
    """Heads whose attention is shown, as LAYER.HEAD from 0: "3.1,12.0"; by default the telling ones of each mixer."""
    mask_heads: Line | None = None
    """Heads that are left out for comparison: `retrieval`, those that copy needles best, beside as many others at random; `random`; or
    LAYER.HEAD,..."""
    mask_count: Heads | None = None
    """How many retrieval or random heads; by default 5 in 100 of all, rounded up."""
    seed: Seed = 0
    """Of needles and random heads."""
    probe: ProbeConfig = ProbeConfig(only="all")
    """Which probes; they look at all rows."""
    needle: NeedleConfig = NeedleConfig()
    """What is hidden in the text and asked for."""
    out: Path | None = None
    """Folder to be made; inspect_STEP in the run folder by default."""

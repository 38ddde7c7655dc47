"""The progress line."""

import io
import math

import pytest
from rich.console import Console

from plait.train.terminal.progress import ProgressLine, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25s"), (45, "45s"), (59.7, "1m 00s"), (200, "3m 20s"), (3725, "1h 02m"), (190_000, "2d 04h"), (math.nan, "–")],
)
def test_durations_read_naturally(seconds, text):
    assert format_seconds(seconds) == text


def test_progress_off_a_terminal_prints_plain_lines_and_always_the_last():
    out = io.StringIO()
    with ProgressLine(100, interval_seconds=1e9, console=Console(file=out, width=200)) as progress:
        for step in range(1, 101):
            progress.update(step, loss=2.0, tokens_per_second=1234.5, mfu=0.41)
        progress.message("sink [layer 1]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and lines[2] == "sink [layer 1]"
    assert lines[0].startswith("step 1/100  loss 2.0000  1,23") and "MFU 41.0%" in lines[0]
    assert lines[1].startswith("step 100/100") and "left 0s" in lines[1]


def test_progress_on_a_terminal_is_one_live_line():
    out = io.StringIO()
    with ProgressLine(10, console=Console(file=out, force_terminal=True, width=120)) as progress:
        progress.update(5, loss=math.nan)
    assert "step 5/10" in out.getvalue() and "loss nan" in out.getvalue()

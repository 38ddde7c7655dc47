"""The progress line."""

import io
import math

import pytest
from rich.console import Console

from plait.train.probes.collect import attention_by_kind
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


def test_what_is_watched_is_told_as_far_as_there_is_room():
    watched = ["full: entropy 0.88, sinks 0.02", "linear: entropy 0.44"]
    for width, there in ((200, 2), (100, 1), (60, 0)):
        out = io.StringIO()
        with ProgressLine(10, console=Console(file=out, force_terminal=True, width=width)) as progress:
            progress.update(5, loss=2.0, watched=watched)
        assert [text in out.getvalue() for text in watched] == [i < there for i in range(2)]


def test_attention_is_told_by_kind():
    latest = {"loss/train": 2.0, "attn/entropy_ratio": 0.66, "attn/sink_rate": 0.1, "attn/dormant_share/source/web": 0.1}
    assert attention_by_kind(latest) == ["attention: entropy 0.66, sinks 0.10"]
    kinds = {
        "attn/full/entropy_ratio": 0.884,
        "attn/full/sink_rate": 0.02,
        "attn/linear/entropy_ratio": 0.44,
        "attn/linear/sink_rate": math.nan,
    }
    assert attention_by_kind(latest | kinds) == ["full: entropy 0.88, sinks 0.02", "linear: entropy 0.44"]
    assert attention_by_kind({"loss/train": 2.0}) == []

"""Metrics, trimming and probe files: strict JSON, exact resume, nothing lost at or before the checkpoint."""

import importlib.util
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from plait.train.metrics import (
    MetricsWriter,
    ProgressLine,
    format_seconds,
    probe_files,
    read_events,
    read_metrics,
    read_probes,
    series,
    trim_metrics,
    write_attention,
    write_layers,
    write_probes,
)


def write_run(run, steps, **options):
    with MetricsWriter(run, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"loss/train": 5.0 - step / 10}, tokens=step * 64, seconds=step / 2)
            writer.write_events(
                [{"step": step, "kind": "k", "layer": None, "head": None, "value": 1.0, "threshold": 0.5, "message": "m"}]
            )
            write_probes(run, step, {"entropy": np.full((2, 2), step)})


def test_metrics_round_trip_with_numbers_that_are_not_finite(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss/train": np.float32(2.5), "grad/norm": math.inf, "loss/val": math.nan}, tokens=64, seconds=0.5)
        writer.write_events([{"step": 1, "kind": "loss_spike", "layer": None, "head": None, "value": math.nan, "threshold": 1.0}])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for name in ("metrics.jsonl", "events.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (record,) = read_metrics(tmp_path)
    assert record["loss/train"] == 2.5 and math.isnan(record["grad/norm"]) and math.isnan(record["loss/val"])
    (event,) = read_events(tmp_path)
    assert math.isnan(event["value"]) and event["layer"] is None


def test_metrics_lines_are_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss/train": 1.0}, tokens=1, seconds=1)
    assert len(read_metrics(tmp_path)) == 1
    writer.close()
    writer.close()


def test_metrics_name_without_a_group_is_refused(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="group/name"):
        writer.write(1, {"loss": 1.0}, tokens=1, seconds=1)


def test_tensorboard_files_are_written(tmp_path):
    with MetricsWriter(tmp_path, resumed_at=3) as writer:
        writer.write(4, {"loss/train": 1.0}, tokens=1, seconds=1)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="tests the error where wandb is not installed")
def test_wandb_without_the_package_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"pip install 'plait\[wandb\]'"):
        MetricsWriter(tmp_path, wandb=True)


def test_unfinished_last_line_is_skipped_and_named(tmp_path, caplog):
    write_run(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert "line 3 is unfinished" in caplog.text
    write_run(tmp_path, [3])  # appending to such a file must not join the two lines
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_last_line_that_only_lacks_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/train": 2.0}')
    assert len(read_metrics(tmp_path)) == 1
    write_run(tmp_path, [2])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .*must be a JSON object"):
        read_metrics(tmp_path)


def test_trim_keeps_the_bytes_up_to_the_step_and_drops_the_rest(tmp_path):
    write_run(tmp_path, [10, 20])
    kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    write_run(tmp_path, [30, 40])
    write_attention(tmp_path, 40, np.zeros((1, 1, 2, 2)), ["a", "b"])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert trim_metrics(tmp_path, 20) == 2 + 1 + 2 + 2 + 1
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert [path.name for path in probe_files(tmp_path)] == ["step_00000010.npz", "step_00000020.npz"]
    assert not (tmp_path / "probes/attention.npz").exists()
    assert trim_metrics(tmp_path, 20) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_trim_keeps_an_earlier_attention_picture(tmp_path):
    write_attention(tmp_path, 20, np.zeros((1, 1, 2, 2)), ["a", "b"])
    assert trim_metrics(tmp_path, 20) == 0
    assert (tmp_path / "probes/attention.npz").exists()


def test_trimmed_and_continued_run_equals_an_unbroken_one(tmp_path):
    write_run(tmp_path / "whole", range(1, 9))
    write_run(tmp_path / "broken", range(1, 7))
    trim_metrics(tmp_path / "broken", 4)
    write_run(tmp_path / "broken", range(5, 9), resumed_at=4)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_probes_round_trip_pads_and_fills_what_is_missing(tmp_path):
    write_layers(tmp_path, [{"index": 0, "mixer": "softmax", "kind": "full", "num_heads": 2}], first_k=4)
    write_probes(tmp_path, 200, {"entropy": np.ones((1, 3)), "head_load": np.ones((1, 3))})
    write_probes(tmp_path, 50, {"entropy": np.zeros((1, 2))})
    probes = read_probes(tmp_path)
    assert probes.steps.tolist() == [50, 200] and probes.first_k == 4 and probes.layers[0]["mixer"] == "softmax"
    assert probes.arrays["entropy"].shape == (2, 1, 3) and probes.arrays["entropy"].dtype == np.float32
    assert np.isnan(probes.arrays["entropy"][0, 0, 2]) and np.isnan(probes.arrays["head_load"][0]).all()


def test_probe_file_that_cannot_be_read_is_named(tmp_path):
    write_probes(tmp_path, 1, {"entropy": np.zeros((1, 2))})
    (tmp_path / "probes/step_00000002.npz").write_bytes(b"PK\x03\x04 nothing")
    probes = read_probes(tmp_path)
    assert probes.steps.tolist() == [1] and "step_00000002.npz cannot be read" in probes.notes[0]


def test_series_takes_the_lines_that_have_the_name():
    steps, values = series([{"step": 1, "loss/val": 3.0}, {"step": 2}, {"step": 3, "loss/val": 2.0}], "loss/val")
    assert steps.tolist() == [1, 3] and values.tolist() == [3.0, 2.0]
    assert series([], "loss/val")[0].size == 0


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

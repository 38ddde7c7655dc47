"""Metrics and events: strict JSON, on disk at once."""

import importlib.util
import json
import math

import numpy as np
import pytest

from plait.train.run_folder.lines import read_events, read_metrics
from plait.train.run_folder.writer import MetricsWriter


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

"""Metrics and events: strict JSON, on disk at once."""

import importlib.util
import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

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


def test_tensorboard_compares_runs_by_their_config(tmp_path):
    """Read back from the file as its format says: records of a length, its checksum, an event, and that one's."""
    config = {"steps": 8, "model": {"pattern": "gla", "tie": True, "dropout": None}, "optimizer": {"learning_rate": 1e-3}}
    MetricsWriter(tmp_path, config=config).close()
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data, at, told = file.read_bytes(), 0, {}
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        for value in Event.FromString(data[at + 12 : at + 12 + size]).summary.value:
            told[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        at += size + 16
    started = told["_hparams_/session_start_info"].session_start_info.hparams
    assert started["model.pattern"].string_value == "gla" and started["model.tie"].bool_value and "model.dropout" not in started
    assert started["optimizer.learning_rate"].number_value == 1e-3
    assert "loss/val" in [metric.name.tag for metric in told["_hparams_/experiment"].experiment.metric_infos]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="tests the error where wandb is not installed")
def test_wandb_without_the_package_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"pip install 'plait\[wandb\]'"):
        MetricsWriter(tmp_path, wandb=True)

"""Trimming: nothing lost at or before the step, nothing kept after it."""

import numpy as np

from plait.tests.train.run_folder.common import write_run
from plait.train.run_folder.probe_files import probe_files, write_attention
from plait.train.run_folder.trim import trim_metrics


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

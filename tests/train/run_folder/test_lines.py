"""Lines that were written are read, and what is broken is said."""

import pytest

from plait.tests.train.run_folder.common import write_run
from plait.train.run_folder.lines import read_metrics, series


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


def test_series_takes_the_lines_that_have_the_name():
    steps, values = series([{"step": 1, "loss/val": 3.0}, {"step": 2}, {"step": 3, "loss/val": 2.0}], "loss/val")
    assert steps.tolist() == [1, 3] and values.tolist() == [3.0, 2.0]
    assert series([], "loss/val")[0].size == 0

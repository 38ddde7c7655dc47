"""What is missing of a run's numbers is said once, and what is there is not complained of."""

from plait.tests.train.run_folder.common import write_run
from plait.train.run_folder.gaps import gaps


def test_a_whole_run_has_none(tmp_path):
    write_run(tmp_path, range(2, 21, 2))
    assert gaps(tmp_path, 21, log_every=2, probe_every=4) == []


def test_what_is_gone_is_named(tmp_path):
    write_run(tmp_path, [1, 2, 5, 6, 9, 11])
    for name in ("events.jsonl", "probes/step_00000006.npz"):
        (tmp_path / name).unlink()
    assert gaps(tmp_path, 12, log_every=1, probe_every=3) == [
        "metrics.jsonl has no lines of steps 3 to 4, 7 to 8, 10",
        "events.jsonl is gone",
        "probe files of steps 3, 6, 12 are gone",
    ]


def test_all_lines_lost(tmp_path):
    assert gaps(tmp_path, 60, log_every=10, probe_every=None)[0] == "metrics.jsonl has no lines of steps 1 to 59"
    assert gaps(tmp_path, 0, log_every=10, probe_every=5) == []

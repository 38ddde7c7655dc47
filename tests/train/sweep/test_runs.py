"""Rows become runs, or all that is wrong with them is said."""

import re
from pathlib import Path

import pytest

from plait.configs.sweeps.rows import each, product, zipped
from plait.launch import main
from plait.tests.train.sweep.common import SMALL, small
from plait.train.sweep import runs, show
from plait.train.sweep.runs import SweepError, resolved
from plait.train.sweep.table import varying


def test_a_run_is_named_by_what_differs_and_what_it_is():
    found = resolved("lm_tiny", product(each("optimizer.learning_rate", 1e-3, 3e-3), each("seed", 0, 1), each("steps", 20)))
    assert all(re.fullmatch(r"learning_rate=0\.00[13],seed=[01]-[0-9a-f]{10}", run.name) for run in found) and len(found) == 4
    assert len({run.content for run in found}) == 4
    (same,) = resolved("lm_tiny", ({"steps": "20", "seed": "1", "optimizer.learning_rate": "0.003"},))
    assert same.content == found[3].content and same.name == f"lm_tiny-{same.content}", "of the config, not of how it is written"


def test_keys_of_one_last_word_are_told_apart_and_patterns_make_names():
    found = resolved("lm_tiny", zipped(each("seed", 0, 1), each("data.seed", 0, 1)))
    assert found[1].name.startswith("seed=1,data.seed=1-")
    found = resolved("lm_tiny", each("model.pattern", "gated_deltanet@0; softmax", "softmax"))
    assert found[0].name.startswith("pattern=gated_deltanet-0-softmax-")
    assert resolved("lm_tiny", each("data.source", "a/b", "c/d"))[0].name.startswith("source=a-b-")


def test_where_a_run_keeps_its_data_is_not_what_it_is():
    one, other = (resolved("lm_tiny", ({"data.cache_dir": folder},))[0] for folder in ("a", "b"))
    assert one.content == other.content


def test_rows_that_make_one_run_count_once(caplog):
    assert len(resolved("lm_tiny", each("optimizer.learning_rate", "1e-3", "0.001", "2e-3"))) == 2
    assert "row 2 (optimizer.learning_rate=0.001) makes the same run as another" in caplog.text


def test_all_that_is_wrong_is_said_with_row_and_key():
    rows = product(each("steps", 20, "x"), each("optimizer.learning_rate", -1, 1e-3), each("model.widht", 5))
    with pytest.raises(SweepError) as error:
        resolved("lm_tiny", (*rows, {"steps": 5}, {"steps": 30}))
    lines = str(error.value).splitlines()
    assert lines[0] == "5 of 6 rows of overrides of lm_tiny cannot be used, and nothing was started:"
    assert any(line.startswith("  rows 1, 2, 3, 4: model.widht=5: '--model.widht=5' is not an option") for line in lines)
    assert any(line.startswith("  rows 1, 3: optimizer.learning_rate=-1: optimizer.learning_rate=-1.0 must be") for line in lines)
    assert any(line.startswith("  rows 3, 4: steps=x: steps='x' must be") for line in lines)
    assert any(line.startswith("  row 5: steps=5: optimizer.warmup_steps=10 must be below steps=5") for line in lines)
    assert len(lines) == 5


def test_values_that_hang_on_each_other_are_not_blamed():
    """With twenty steps of warm-up, ten steps are wrong; the row's own five make them right, and only the bad key is named."""
    with pytest.raises(SweepError) as error:
        resolved("lm_tiny", ({"steps": 8, "optimizer.warmup_steps": 5, "seed": -1},))
    assert str(error.value).count("\n") == 1 and "row 1: seed=-1" in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"out": "a"}, "out cannot be given to a sweep: the sweep gives each run a folder"),
        ({"resume": True}, "resume cannot be given to a sweep"),
        ({"event.sink_formed.action": "stop", "probe_every": None}, "event.sink_formed"),
        ({"init_from": "nowhere"}, "init_from='nowhere' must be a run folder"),
        ({"model.vocab_size": 5}, "vocab_size"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before(row, message):
    with pytest.raises(SweepError, match=message):
        resolved("lm_tiny", (row,))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SweepError, match=r"needs the package wandb, which is not installed; pip install 'plait\[wandb\]'"):
        resolved("lm_tiny", ({"wandb": "project"},))


def test_dry_run_shows_runs_and_starts_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "lm_tiny", "--optimizer.learning-rate", "1e-3,3e-3", "--seeds", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 runs; no time: nothing was measured yet" in shown and "45.6K" in shown and list(tmp_path.iterdir()) == []
    assert main(["sweep", "lm_tiny", "--dry-run"]) == 0
    assert "1 run; " in capsys.readouterr().out
    assert main(["sweep", "sparse_recall", "--seeds", "1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "what differs" in shown and max(map(len, shown.splitlines())) < 160, "of few rows' options most cells would be empty"


def test_dry_run_is_shown_where_the_usual_folder_holds_another_sweep(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small(Path("sweeps/lm_tiny"), corpus, "--seed", "0,1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    words = ["sweep", "lm_tiny", "--seed", "5,6,7"]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "3 runs; " in told.out
    refused = "out='sweeps/lm_tiny' holds another sweep, begun with 'lm_tiny --model.pattern=softmax"
    assert f"without --dry-run this is refused: {refused}" in told.err and "as --out sweeps/lm_tiny-2. It" in told.err
    grown = ["--seed", "0,1,2", *SMALL, "--data.source", str(corpus)]
    assert main(["sweep", "lm_tiny", *grown, "--dry-run"]) == 0, "such a sweep would be given a run more"
    told = capsys.readouterr()
    assert "3 runs; " in told.out and "refused" not in told.err
    assert main([*words, "--dry-run", "--out", "sweeps/other"]) == 0 and "refused" not in capsys.readouterr().err
    assert main([*words, "--status"]) == 2 and refused in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_narrow_terminal_shows_in_one_column_what_sets_runs_apart(tmp_path, corpus):
    rows = ["--optimizer.learning-rate", "1e-3,3e-3", "--model.mixers.softmax.num-heads", "1,2", "--seeds", "2"]
    sweep = small(tmp_path, corpus, *rows)
    narrow, _ = show.status_table(tmp_path, sweep, 80)
    assert [column.header for column in narrow.columns] == ["run", "what differs", "status", "step", "loss", "left", "host"]
    assert [*narrow.columns[1].cells][3] == "learning_rate=0.001, num_heads=2, seed=1"
    wide, _ = show.status_table(tmp_path, sweep, 200)
    assert "optimizer.learning_rate" in [column.header for column in wide.columns]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep", "sweep needs a study, a preset or the folder of a sweep first"),
        ("sweep ration", "'ration' is no study, no preset and no folder with a sweep.json; did you mean 'ratio'?"),
        ("sweep lm_tiny --seed 0,x --dry-run", "row 2: seed=x: seed='x' must be a whole number"),
        ("sweep lm_tiny --seed 0 --status", "holds no sweep.json"),
        ("sweep ratio --seed 5 --dry-run", "seed is given, and seeds=3 numbers the runs of each row; use --seeds None"),
        ("sweep ratio --mixer glaa --dry-run", "mixer='glaa' must be one of"),
    ],
)
def test_bad_commands(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2 and message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_path_without_a_sweep_says_so_and_lists_no_studies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr").mkdir()
    (tmp_path / "notes.txt").touch()
    begin = "; give the folder of a sweep that was begun, or begin one with a study or a preset: launch.py sweep PRESET"
    for path, what in (
        ("lr", "a folder that holds no sweep.json: no sweep was begun there"),
        (str(tmp_path / "lr"), "a folder that holds no sweep.json: no sweep was begun there"),
        ("sweeps/lr", "not there"),
        ("notes.txt", "a file"),
    ):
        for more in ([], ["--status"]):
            assert main(["sweep", path, *more]) == 2
            said = capsys.readouterr().err
            assert f"{path!r} is {what}{begin}" in said and "ratio" not in said


def test_a_component_that_is_left_as_it_is_differs_from_none():
    rows = (
        {"seed": 0},
        {"model.mixers.softmax.positions": None},
        {"model.mixers.softmax.positions": "alibi"},
        {"data.task": "mqar"},
    )
    found = varying(resolved("lm_tiny", rows)).values()
    assert [one["model.mixers.softmax.positions"] for one in found] == ["rotary", None, "alibi", "rotary"]
    assert [one["data.task"] for one in found] == ["ppl", "ppl", "ppl", "mqar"]

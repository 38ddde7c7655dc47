"""Runs of any size stay readable: extremes are kept, pictures and the page small; runs beside each other show what differs."""

import json

import matplotlib
import numpy as np
import pytest

from plait.train.probes.base import statistics
from plait.train.report import MOST_OPEN, write_report
from plait.train.report.panels.curves import thin
from plait.train.report.panels.maps import MOST_ROWS, folded
from plait.train.report.run import MOST_PROBES, load_run
from plait.train.report.style import RC, panels, title
from plait.train.run_folder.probe_files import write_layers, write_probes
from plait.train.run_folder.writer import MetricsWriter


def make_run(run, *, layers=2, heads=2, level=1.0, steps=(10, 20), config=None):
    """A run folder with one loss and one sink weight a step."""
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"steps": steps[-1], **(config or {})}))
    entry = {"mixer": "softmax", "kind": "full", "num_heads": heads, "head_kinds": ["attention"] * heads}
    write_layers(run, [{"index": i, **entry} for i in range(layers)], first_k=4)
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write_events([])
        for step in steps:
            writer.write(step, {"loss/train": level, "loss/val": level, "grad/norm": 2.0}, tokens=step, seconds=1.0)
            write_probes(run, step, {"sink": np.full((layers, heads, 4), 0.1 * level)})
    return run


def test_lines_of_many_points_keep_their_extremes_and_their_beginning():
    steps = np.arange(100_000)
    values = np.sin(steps / 7)
    values[[31_234, 77_001]] = 9, -9
    values[50_000] = np.nan
    for log in (False, True):
        x, y = thin(steps, values, log=log)
        assert len(x) <= 2000 and (np.diff(x) > 0).all() and {9, -9} <= set(y) and (values[x] == y).all()
    assert x[:20].tolist() == list(range(20))  # a logarithmic axis begins with single steps
    assert thin(steps[:2000], values[:2000])[0].size == 2000


def test_maps_of_many_heads_have_the_strongest_of_neighbours_in_a_row():
    values = np.random.default_rng(0).uniform(size=(3, 100, 62)).astype(np.float32)
    values[:, 7, 30:] = np.nan  # a layer of fewer heads
    for least, extreme in ((False, np.nanmax), (True, np.nanmin)):
        rows, together = folded(values, least=least)
        assert together == int(np.ceil(100 * 62 / MOST_ROWS)) and rows.shape == (3, 100, -(-62 // together))
        assert np.array_equal(rows[:, 3, 2], extreme(values[:, 3, 2 * together : 3 * together], axis=1))
        assert np.isnan(rows[:, 7, -1]).all() and np.array_equal(extreme(rows, axis=(1, 2)), extreme(values, axis=(1, 2)))
    assert folded(values[:, :4])[1] == 1


def test_many_probe_steps_are_drawn_evenly_and_those_of_events(tmp_path):
    run = make_run(tmp_path / "run", layers=1, heads=1)
    for step in range(30, 10_000, 10):
        write_probes(run, step, {"sink": np.full((1, 1, 4), 0.1)})
    left_out = int(np.setdiff1d(np.arange(10, 10_000, 10), load_run(run, "run").probes.steps)[300])
    event = {"kind": "sink_onset", "layer": 0, "head": 0, "value": 1.0, "threshold": 0.5, "message": ""}
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write_events([{"step": left_out, **event}])
    loaded = load_run(run, "run")
    steps = loaded.probes.steps
    assert len(steps) == MOST_PROBES and steps[0] == 10 and steps[-1] == 9_990 and left_out in steps
    assert np.diff(steps).max() <= 60 and any("400 of 999 probe steps are drawn" in note for note in loaded.notes)


@pytest.mark.parametrize("text", ["Sink", "Where the first token has the largest"])
def test_titles_stay_left_of_the_scale_beside_them(text):
    with matplotlib.rc_context(RC):
        figure, axes = panels(4, columns=4, height=1.5, left=0.5, gap=(0.42, 0.8))
        title(axes[0], text, size=8.5, beside=0.38)
        width = axes[0].get_window_extent().width
        extent = axes[0]._left_title.get_window_extent(figure.canvas.get_renderer())
    assert extent.width <= (1 - 0.38) * width
    assert len(axes[0].get_title("left").splitlines()) <= 2


def test_a_page_of_many_sections_has_contents_and_is_folded(tmp_path):
    run = make_run(tmp_path / "run")
    text = write_report([run]).read_text()
    assert 'class="contents"' not in text and "<details><summary><h2>Attention over training" not in text
    sections = {one.panel.section: one for one in statistics().values() if one.panel is not None and one.panel.lines}
    assert len(sections) > MOST_OPEN
    shapes = {one.name: (2,) * (1 + (one.per == "head")) + (4,) * (one.size is not None) for one in sections.values()}
    write_probes(run, 30, {name: np.ones(shape) for name, shape in shapes.items()})
    text = write_report([run]).read_text()
    assert 'class="contents"' in text
    for title_of in sections:
        assert f"<details><summary><h2>{title_of}" in text, title_of


def test_differences_from_the_first_run_are_shown(tmp_path):
    first = make_run(tmp_path / "a", level=1.0, config={"optimizer": {"rate": 0.1}})
    second = make_run(tmp_path / "b", level=1.5, config={"optimizer": {"rate": 0.2}})
    text = write_report([first, second], tmp_path / "out").read_text()
    assert text.index("<h3>Runs</h3>") < text.index("<th>rate</th>") < text.index("Metrics at the end")
    assert "<th>rate</th>" in text and "<td class=n>1.5<small>+0.5</small></td>" in text and "<small>+0</small>" in text
    assert (tmp_path / "out/differences.png").exists() and "less that of a" in text


def test_runs_of_other_shapes_have_no_maps_of_differences(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", layers=3)]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "No run has as many layers and heads as a" in text and not (tmp_path / "out/differences.png").exists()
    assert "optimizer" not in text


def test_runs_of_the_same_settings_are_said_to_be_so(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    assert "The settings of the runs are the same." in write_report(runs, tmp_path / "out").read_text()


@pytest.mark.parametrize("name", ["index.html", "loss.png"])
def test_files_that_are_of_no_report_are_kept(tmp_path, name):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    (out / "other.txt").write_text("mine")
    with pytest.raises(ValueError, match="use another --out"):
        write_report([run], out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine", "other.txt": "mine"}
    (out / name).unlink()
    assert write_report([run], out) == write_report([run], out) == out / "index.html"
    assert (out / "other.txt").read_text() == "mine"


def test_out_that_is_a_file_and_runs_that_are_none_are_errors(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="is a file; give a folder as --out"):
        write_report([run], run / "config.json")
    with pytest.raises(ValueError, match="does not exist, so it is not a run"):
        write_report([run, tmp_path / "missing"])
    with pytest.raises(ValueError, match="is no folder"):
        write_report([run / "metrics.jsonl"])

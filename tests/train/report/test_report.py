"""The report: written from run folders alone, whole, escaped, and clear about what is missing."""

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from plait.tests.train.report.made_runs import make_attention, make_run
from plait.train.probes.base import chosen, statistics
from plait.train.report import write_report
from plait.train.report.panels import curves
from plait.train.report.panels.curves import smooth
from plait.train.report.run import load_run, load_runs
from plait.train.report.style import panels
from plait.train.run_folder.probe_files import write_attention, write_layers, write_probes
from plait.train.run_folder.writer import MetricsWriter


class Page(HTMLParser):
    """Counts tags, checks that they close, and collects every address."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hybrid")


@pytest.fixture(scope="module")
def full_report(full_run):
    return write_report([full_run])


def test_report_of_a_full_run_is_self_contained_and_small(full_run, full_report):
    path = full_report
    assert path == full_run / "report/index.html" and path.stat().st_size < 5e6
    text = path.read_text()
    parsed = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in parsed.addresses)
    assert "url(" not in text and "@import" not in text
    assert parsed.tags.count("img") == len(list(path.parent.glob("*.png"))) == 34
    for part in (
        "41.3M",
        "8 × NVIDIA H100",
        "sink onset",
        "loss spike",
        "bits per byte",
        "decay horizon".capitalize(),
        "dormancy by source".capitalize(),
    ):
        assert part in text


def test_report_of_several_runs_overlays_and_compares_them(tmp_path):
    run = make_run(tmp_path / "hybrid", heads=4, steps=400, probes=5, moh=False)
    other = make_run(tmp_path / "softmax", pattern=("softmax",) * 4, heads=4, steps=200, probes=5, seed=1, level=2.9, moh=False)
    path = write_report([run, other], tmp_path / "out")
    text = path.read_text()
    Page(text)
    assert path == tmp_path / "out/index.html" and not (tmp_path / "report").exists()
    for part in (
        "2 runs compared",
        "hybrid has the lowest validation loss",
        "whether that is more than noise is not known",
        "<th>num_layers</th>",
        "same number of tokens",
    ):
        assert part in text
    assert {p.name for p in path.parent.glob("attention*.png") if "-" not in p.name} == {"attention.png", "attention_1.png"}


def test_report_of_runs_with_the_same_folder_name_tells_them_apart(tmp_path):
    runs = [
        make_run(tmp_path / name / "run", pattern=("softmax",), heads=2, steps=20, probes=2, moh=False) for name in ("a", "b")
    ]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "a/run" in text and "b/run" in text


def test_report_goes_beside_the_first_of_several_runs(tmp_path):
    runs = [make_run(tmp_path / name, pattern=("softmax",), heads=2, steps=20, probes=1, moh=False) for name in ("a", "b")]
    assert write_report(runs) == tmp_path / "report/index.html"


def test_run_with_a_single_metrics_line_says_what_is_missing(tmp_path):
    with MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        writer.write(1, {"loss/train": 9.5}, tokens=64, seconds=1.0)
    text = write_report([tmp_path / "run"]).read_text()
    Page(text)
    for part in (
        "One training loss was logged: 9.500 at step 1.",
        "config.json is missing or cannot be read",
        "No probe was recorded",
        "no attention pictures were written",
        "No event was recorded",
    ):
        assert part in text, part


def test_run_without_any_line_still_has_a_report(tmp_path):
    MetricsWriter(tmp_path / "run", tensorboard=False).close()
    assert "No loss was logged." in write_report([tmp_path / "run"]).read_text()


def test_run_whose_values_are_not_finite_or_cut_off_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", pattern=("softmax", "gla"), heads=2, steps=40, probes=3, moh=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": 1, "seconds": 9.0, "loss/train": null}\n{"step": 42, "lo')
    probes = {"sink": np.full((2, 2, 4), np.nan), "entropy_ratio": np.full((2, 2), np.nan), "max_logit": np.full((2, 2), np.inf)}
    write_probes(run, 41, probes)
    (run / "probes/attention.npz").write_bytes(b"no zip")
    (run / "events.jsonl").unlink()
    text = write_report([run]).read_text()
    assert "1 logged loss not finite" in text and "line 43 is unfinished" in text
    assert "attention.npz cannot be read" in text and "derived from the probe files" in text


@pytest.mark.parametrize("name", ["config.json", None])
def test_folder_that_is_not_a_run_is_an_error(tmp_path, name):
    if name:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is not a run: .*metrics.jsonl; give the folder"):
        write_report([tmp_path])
    with pytest.raises(ValueError, match="name at least one"):
        write_report([])


def test_every_string_of_a_run_is_escaped(tmp_path):
    bad = "<script>alert('x')</script>&\"$"
    run = make_run(tmp_path / "<script>a&b$", pattern=("softmax", "softmax"), heads=2, steps=20, probes=2, tokens=12)
    config = {"name": bad, "model": {"pattern": bad}, bad: bad}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({"devices": {"kind": bad}, "commit": bad, "num_params": bad}))
    write_layers(
        run,
        [{"index": i, "mixer": bad, "kind": bad, "num_heads": 2, "head_kinds": ["attention"] * 2} for i in range(2)],
        first_k=4,
    )
    write_attention(
        run,
        20,
        make_attention(np.random.default_rng(0), [{"num_heads": 2, "kind": "full", "mixer": "softmax"}] * 2, 12),
        [bad] * 12,
    )
    event = {"step": 3, "kind": bad, "layer": 0, "head": 0, "value": 1.0, "threshold": 0.5, "message": bad}
    with MetricsWriter(run, tensorboard=False) as writer:
        writer.write_events([event])
        writer.write(21, {f"{bad}/{bad}": 1.0}, tokens=1, seconds=1.0)
    second = make_run(tmp_path / "_second", pattern=("softmax",), heads=2, steps=20, probes=2, moh=False)
    for runs in ([run], [run, second]):
        text = write_report(runs, tmp_path / "out").read_text()
        parsed = Page(text)
        ours = int(len(runs) > 1)  # what sorts the table of several
        assert parsed.tags.count("script") == text.count("<script") == ours and "&lt;script&gt;" in text
        assert all(address.startswith(("#", "data:image/png;base64,")) for address in parsed.addresses)
    assert "Sink rate as published" in {probe.topic() for probe in chosen()} and "Sink k eps" not in text


def test_every_panel_is_drawn_and_every_statistic_and_event_defined(full_report):
    text = full_report.read_text()
    panels = [one.panel for one in statistics().values() if one.panel is not None]
    for words in {panel.title for panel in panels} | {panel.section for panel in panels}:
        assert html.escape(words) in text, words
    for part in ("induction head", "Massive activations in layers", "heads are chosen by".capitalize(), "became a sink"):
        assert part in text, part


def test_a_metric_of_kinds_of_layers_is_drawn_once(tmp_path, monkeypatch):
    """Beside each other in one panel; what one kind alone has is that of all layers."""
    runs = [make_run(tmp_path / name, pattern=("softmax", "gla"), heads=2, steps=20, probes=2, moh=False) for name in "ab"]
    for run in runs:
        with MetricsWriter(run, tensorboard=False) as writer:
            entropy = {f"attn/{kind}entropy_mean": value for kind, value in (("", 1.0), ("full/", 1.5), ("linear/", 0.5))}
            sinks = {"attn/sink_elsewhere": 0.2, "attn/full/sink_elsewhere": 0.2}
            for step in (21, 22):
                writer.write(step, entropy | sinks, tokens=1, seconds=1.0)
    drawn, title = {}, curves.title
    monkeypatch.setattr(curves, "title", lambda ax, words, **style: (drawn.update({words: ax}), title(ax, words, **style)))
    curves.scalars(load_runs(runs[:1]))
    assert [name for name in drawn if name.startswith("attn/")] == ["attn/entropy_mean", "attn/sink_elsewhere"]
    labels = [[text.get_text() for text in found.get_texts()] for ax in drawn.values() if (found := ax.get_legend())]
    assert labels == [["all", "full", "linear"]]
    ends = {line.get_label(): line.get_ydata()[-1] for line in drawn["attn/entropy_mean"].lines}
    assert ends["full"] == 1.5 and ends["linear"] == 0.5 and 0.4 < ends["all"] < 1.1
    drawn.clear()
    curves.scalars(load_runs(runs))
    kinds = ["attn/entropy_mean", "attn/full/entropy_mean", "attn/linear/entropy_mean", "attn/sink_elsewhere"]
    assert [name for name in drawn if name.startswith("attn/")] == kinds


def test_what_no_layer_has_is_named_and_has_no_section(tmp_path):
    run = make_run(tmp_path / "run", pattern=("softmax",), heads=2, steps=20, probes=2, moh=False)
    text = write_report([run]).read_text()
    assert "Not recorded" in text and "head load" in text and "<h2>Mixture of heads" not in text


def test_arrays_of_a_probe_that_is_gone_are_drawn(tmp_path):
    run = make_run(tmp_path / "run", pattern=("softmax", "gla"), heads=2, steps=20, probes=1, moh=False)
    for step, shape in ((10, (2,)), (20, (2,))):
        write_probes(run, step, {"of_layers": np.full(shape, 2.0), "of_heads": np.ones((2, 2)), "of_entries": np.ones((2, 2, 3))})
    loaded = load_run(run, "run")
    assert [loaded.by_head(name).shape for name in ("of_layers", "of_heads", "of_entries")] == [(3, 2, 1), (3, 2, 2), (3, 2, 2)]
    text = write_report([run]).read_text()
    assert "<h2>Of other probes" in text and "of_entries" in text


def test_heads_of_a_parallel_layer_are_lines_of_their_own(tmp_path):
    """And events derived from the probe files leave its states out too."""
    run = make_run(tmp_path / "run", pattern=("parallel", "softmax"), heads=4, steps=20, probes=2, moh=False)
    groups = load_run(run, "run").by_group("entropy_ratio")
    assert [group.words for group in groups] == [
        "full layers",
        "parallel layers' attention heads",
        "parallel layers' state heads",
    ]
    attention, state = list(groups.values())[1:]
    assert np.isfinite(attention[:, 0, :2]).all() and np.isnan(attention[:, 0, 2:]).all() and np.isnan(attention[:, 1]).all()
    assert np.isfinite(state[:, 0, 2:]).all() and np.isnan(state[:, 0, :2]).all()
    for step in (30, 40):
        write_probes(run, step, {"entropy_ratio": np.array([[0.5, 0.5, 0.5, 0.01], [0.5] * 4])})
    (run / "events.jsonl").unlink()
    assert not load_run(run, "run").events_of("entropy_collapse")
    assert "parallel layers&#x27; state heads" in write_report([run]).read_text()


def test_run_folders_of_before_heads_had_kinds_are_read(tmp_path):
    run = make_run(tmp_path / "run", pattern=("gla", "softmax"), heads=2, steps=20, probes=2)
    kinds = [layer["head_kinds"] for layer in load_run(run, "run").layers]
    tree = json.loads((run / "probes/layers.json").read_text())
    for layer in tree["layers"]:
        del layer["head_kinds"]
    (run / "probes/layers.json").write_text(json.dumps(tree))
    assert [layer["head_kinds"] for layer in load_run(run, "run").layers] == kinds == [["state"] * 2, ["attention"] * 2]


def test_report_leaves_no_style_behind(tmp_path):
    before = dict(matplotlib.rcParams)
    write_report([make_run(tmp_path / "run", pattern=("gla",), heads=1, steps=10, probes=1, moh=False)])
    assert dict(matplotlib.rcParams) == before


def test_smooth_starts_unbiased_and_has_gaps_where_nothing_is_known():
    values = np.r_[10.0, np.nan, np.full(98, 10.0), np.full(20, np.inf)]
    found = smooth(values)
    assert np.array_equal(np.isfinite(found), np.isfinite(values)) and np.allclose(found[np.isfinite(values)], 10.0)


def test_losses_that_are_not_finite_are_marked(tmp_path):
    """No line goes on after the last finite loss, and each step without one has its cross, of many an even part."""
    values = np.r_[np.linspace(4, 3, 50), np.nan, np.full(49, 3.0), np.full(900, np.nan)]
    records = [{"step": step, "loss/train": value} for step, value in enumerate(values, 1)]
    run = dataclasses.replace(
        load_run(make_run(tmp_path / "run", pattern=("softmax",), heads=2, steps=20, probes=2), "run"), records=records
    )
    _, axes = panels(1, columns=1, height=2)
    curves._smooth_losses(axes[0], [run], 1)
    curves._loss_of(axes[0], run, 1, alone=True)
    *lines, crosses = axes[0].lines
    assert (
        [int(at) for at in crosses.get_xdata()[:1]] == [51]
        and len(crosses.get_xdata()) == 200
        and crosses.get_xdata()[-1] == 1000
    )
    for line in lines:
        x, y = line.get_data()
        assert not np.isfinite(np.asarray(y, float)[np.asarray(x) > 100]).any()
    assert "a cross is on the upper edge" in curves.loss([run]).caption

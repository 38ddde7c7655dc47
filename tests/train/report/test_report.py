"""The report: written from run folders alone, whole, escaped, and clear about what is missing."""

import dataclasses
import html
import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from plait.configs.probe import ProbeConfig
from plait.train.probes.base import chosen, statistics
from plait.train.report import write_report
from plait.train.report.panels import curves
from plait.train.report.panels.curves import smooth
from plait.train.report.run import load_run
from plait.train.report.style import panels
from plait.train.run_folder.probe_files import write_attention, write_layers, write_probes
from plait.train.run_folder.writer import MetricsWriter
from plait.train.watching.spikes import LossSpikes

SOURCES = ("web", "code")
KIND = {"softmax": "full", "sliding_window": "sparse", "gated_deltanet": "linear", "gla": "linear", "parallel": "parallel"}
TEXT = "The old lighthouse keeper wrote in his log every night: wind, tide, ships. When the storm came, he wrote the same words: "
HYBRID = ("gated_deltanet", "gated_deltanet", "sliding_window", "softmax") * 2


def entry(index, mixer, heads):
    """The entry of a layer in `layers.json`."""
    kinds = ["attention"] * (heads // 2) + ["state"] * (heads - heads // 2)
    if KIND[mixer] != "parallel":
        kinds = [("state" if KIND[mixer] == "linear" else "attention")] * heads
    return {"index": index, "mixer": mixer, "kind": KIND[mixer], "num_heads": heads, "head_kinds": kinds}


def make_run(run, *, pattern=HYBRID, heads=8, steps=2000, probes=40, seed=0, tokens=64, level=2.6, moh=True, spike=True):
    """Writes a run folder that looks like a real one: falling loss, sinks emerging in softmax layers, sharpening heads."""
    rng, depth = np.random.default_rng(seed), len(pattern)
    layers = [entry(i, mixer, heads) for i, mixer in enumerate(pattern)]
    run.mkdir(parents=True)
    runs = [(mixer, len(list(group))) for mixer, group in itertools.groupby(pattern[:4])]
    model = {
        "pattern": ",".join(mixer if count == 1 else f"{mixer}*{count}" for mixer, count in runs),
        "d_model": 512,
        "num_layers": depth,
    }
    config = {
        "name": "lm_quick",
        "steps": steps,
        "seed": seed,
        "model": model,
        "data": {"sources": {name: {} for name in SOURCES}},
    }
    (run / "config.json").write_text(json.dumps(config))
    environment = {
        "num_params": 41_300_000,
        "devices": {"kind": "NVIDIA H100", "platform": "gpu", "count": 8},
        "jax": "0.11.2",
        "commit": "0123abc",
    }
    (run / "environment.json").write_text(
        json.dumps({**environment, "kernels": {"attention": "pallas_gpu", "delta_rule": "chunked"}})
    )
    write_layers(run, layers, first_k=4)
    losses, watchers = LossSpikes(), [watcher for probe in chosen() for watcher in probe.watchers(layers)]
    onset = rng.uniform(0.25, 1.3, (depth, heads))
    top = np.where(rng.random((depth, heads)) < 0.5, rng.uniform(0.35, 0.9, (depth, heads)), 0.08)
    with MetricsWriter(run, tensorboard=False) as writer:
        for step in range(0, steps + 1, max(1, steps // 400)):
            share = step / steps
            loss = level + 8.2 * np.exp(-step / (0.05 * steps)) + 0.6 * np.exp(-3 * share) + rng.normal(0, 0.04)
            loss += 1.6 * np.exp(-(((share - 0.62) / 0.004) ** 2)) * spike
            values = {"loss/train": loss, "grad/norm": np.exp(rng.normal(-0.6, 0.2)) * (1 + 4 * np.exp(-9 * share))}
            values |= {"optimizer/learning_rate": 3e-3 * min(1, share / 0.05) * (0.55 + 0.45 * np.cos(np.pi * share))}
            values |= {
                "throughput/tokens_per_second": 4.1e5 * (1 if step else 0.02) * rng.normal(1, 0.01),
                "throughput/mfu": 0.41,
            }
            values |= {
                "time/step": 0.16 if step else 8.0,
                "attn/entropy_mean": 0.9 - 0.4 * share,
                "attn/max_logit": 4 + 20 * share,
            }
            if step % (steps // 10) == 0:
                values |= {"loss/val": loss + 0.06, "loss/bits_per_byte": (loss + 0.06) / 2.9, "loss/in_context": -0.4 * share}
                values |= {"predictions/repetition": 0.3 - 0.2 * share}
                values |= {f"position/{first}": loss + 2 / (1 + 4 * share * first) for first in (0, *(2**i for i in range(11)))}
            writer.write(step, values, tokens=step * 65536, seconds=step * 0.16 + 8)
            writer.write_events(losses.update(step, {"loss/train": loss}))
        for step in np.linspace(0, steps, probes).astype(int):
            arrays = make_probes(rng, layers, step / steps, onset=onset, top=top, moh=moh)
            write_probes(run, step, arrays)
            writer.write_events(event for watcher in watchers for event in watcher.update(int(step), arrays))
    words = re.findall(r"\w+|[^\w]", TEXT * 8)[:tokens]
    write_attention(run, steps, make_attention(rng, layers, tokens), words)
    return run


def make_probes(rng, layers, share, *, onset, top, moh):
    """Probe arrays at `share` of the training."""
    kinds, shape = np.array([layer["kind"] for layer in layers]), onset.shape
    linear, full = (kinds == "linear")[:, None], (kinds == "full")[:, None]
    noise = rng.normal(0, 0.01, shape)
    sink = np.where(full, 0.06 + top / (1 + np.exp(-25 * (share - onset))), np.where(linear, 0.12, 0.05)) + np.abs(noise)
    sink[0, 0] = 0.42 - 0.3 * share  # a linear head that favours the first token from the start
    entropy = np.where(full, 0.97 - 0.5 * share - 0.35 * sink, np.where(linear, 0.85 - 0.25 * share, 0.9 - 0.2 * share))
    depth = np.arange(len(layers))[:, None]
    spread = np.linspace(-1, 1, shape[1])[None] + 0 * depth
    peak = np.where(np.arange(len(layers)) > 2, 1 + 40 * share**2, 1.2)
    residual = 6 + 3 * np.arange(len(layers)) + np.where(np.arange(len(layers)) > 2, 900 * share**3, 0)
    arrays = {
        "entropy": (entropy + noise) * 4.0,
        "entropy_ratio": np.clip(entropy + noise + 0.06 * spread, 0.02, 1),
        "sink": np.stack([sink, *(0.04 + np.abs(rng.normal(0, 0.01, shape)) for _ in range(3))], -1),
        "sink_rate": np.clip((sink - 0.2) * 3, 0, 1),
        "max_logit": np.where(linear, np.nan, 4 + 70 * share**2 * (1 + 0.3 * spread) * (depth + 1) / len(layers)),
        "value_drain": np.where(full, 1 - 0.9 * np.clip(sink, 0, 1), 1 + noise),
        "value_norm": np.where(full, 1 + share, 1 + noise),
        "decay_horizon": np.where(linear, np.exp(3 + 2.2 * spread + 1.2 * share), np.nan),
        "write_strength": np.where(linear, 0.5 + 0.2 * share * spread + noise, np.nan),
        "state_norm": np.where(linear, 2 + 6 * share + spread, np.nan),
        "residual_top": residual[:, None] * np.array([1.0, 0.7, 0.4]),
        "residual_norm": residual / 20,
        "residual_median": np.full(len(layers), 0.4 + 0.2 * share),
        "residual_peak": peak,
        "state_rank": np.where(linear, 20 - 10 * share + spread, np.nan),
        "token_similarity": 0.2 + 0.6 * share * (np.arange(len(layers)) + 1) / len(layers),
        "token_rank": 40 - 20 * share - np.arange(len(layers)),
        "spectral_norm": 2 + 6 * share + 0 * residual,
        "spectral_norm_out": 1 + 2 * share + 0 * residual,
        "logit_norm": np.where(full, 2 + 20 * share + spread, np.nan),
        "entropy_bound": np.where(full, 1e-3 * (1 - share) + 1e-4 * spread, np.nan),
        "entropy_bounded": np.where(full, 4 - 2 * share + noise, np.nan),
        **{f"{kind}_gate": np.where(linear, 0.5 + 0.3 * share * spread, np.nan) for kind in ("output", "decay", "write")},
        **{f"{kind}_gate_saturated": np.where(linear, 0.1 + np.abs(noise), np.nan) for kind in ("output", "decay", "write")},
        "induction": np.where(linear, 0.02, np.clip(0.7 * share * (spread > 0.7) + np.abs(noise), 0, 1)),
        "previous_token": np.clip(0.1 + noise, 0, 1),
        "massive_activations": np.where(residual > 300, 3.0, 0.0),
        "massive_channels": np.where(residual > 300, 1.0, 0.0),
        "gradient_start": 1 + 4 * share * (depth[:, 0] > 2),
        "gradient_largest": 0.02 + 0.2 * share + 0 * residual,
        "gradient_largest_is_first": share + 0 * residual,
        "head_importance": (1 + 0.5 * spread) / np.linalg.norm(1 + 0.5 * spread, axis=1, keepdims=True),
        "sink_elsewhere": np.where(linear, np.nan, 0.03 + np.abs(noise)),
    }
    if moh:
        arrays |= {"expert_load_most": 1 + 0.5 * share + 0 * residual, "expert_load_least": 0.8 - 0.5 * share + 0 * residual}
        arrays |= {
            "expert_concentration": 0.1 + 0.5 * share + 0 * residual,
            "head_concentration": 0.2 + 0.3 * share + 0 * residual,
        }
        arrays["transfer_error"] = 0.5 * share + 0 * residual
        arrays["head_load"] = np.where(full, np.clip(0.5 + 0.45 * share * spread + noise, 0, 1), np.nan)
        for name, one in statistics().items():  # the others: a value for each panel
            like = one.shape(shape[1], ProbeConfig(), len(SOURCES))
            arrays.setdefault(name, np.full((shape[0], *like), 0.1 + 0.2 * share))
        arrays["dormant_by_source"] = np.stack([np.clip(0.5 + 0.4 * share * sign * spread, 0, 1) for sign in (1, -1)], -1)
        arrays["dormant_by_source"][..., rng.integers(2)] = np.nan  # a step may look at rows of one source alone
    return arrays


def make_attention(rng, layers, size):
    """Attention pictures with sinks, local bands and, for the delta rule, negative weights."""
    rows, columns = np.mgrid[:size, :size]
    causal, maps = columns <= rows, []
    for layer in layers:
        for head in range(layer["num_heads"]):
            reach = 2.0 ** (head % 6 + 1)
            scores = -(rows - columns) / reach + rng.gumbel(0, 0.7, (size, size))
            if layer["kind"] == "full":
                scores += (head % 3 == 0) * 5.0 * (columns == 0)
            if layer["kind"] == "sparse":
                scores = np.where(rows - columns < 16, scores, -np.inf)
            weights = np.where(causal, np.exp(scores), 0)
            if layer["mixer"] == "gated_deltanet":
                weights *= np.sign(rng.normal(0.9, 1, (size, size)))
            else:
                weights /= weights.sum(-1, keepdims=True)
            maps.append(weights)
    return np.reshape(maps, (len(layers), -1, size, size))


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

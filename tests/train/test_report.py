"""The report: written from run folders alone, whole, escaped, and clear about what is missing."""

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from plait.train.metrics import MetricsWriter, write_attention, write_layers, write_probes
from plait.train.probes.events import EventDetector
from plait.train.report import write_report

KIND = {"softmax": "full", "sliding_window": "sparse", "gated_deltanet": "linear", "gla": "linear"}
TEXT = "The old lighthouse keeper wrote in his log every night: wind, tide, ships. When the storm came, the keeper wrote the same words: "
HYBRID = ("gated_deltanet", "gated_deltanet", "sliding_window", "softmax") * 2


def make_run(run, *, pattern=HYBRID, heads=8, steps=2000, probes=40, seed=0, tokens=64, level=2.6, moh=True, spike=True):
    """Writes a run folder that looks like a real one: falling loss, sinks emerging in softmax layers, sharpening heads."""
    rng, depth = np.random.default_rng(seed), len(pattern)
    layers = [{"index": i, "mixer": mixer, "kind": KIND[mixer], "num_heads": heads} for i, mixer in enumerate(pattern)]
    run.mkdir(parents=True)
    model = {"pattern": ",".join(pattern[:4]), "d_model": 512, "num_layers": depth}
    (run / "config.json").write_text(json.dumps({"preset": "lm_quick", "steps": steps, "seed": seed, "model": model}))
    environment = {"parameters": 41_300_000, "devices": ["NVIDIA H100"] * 8, "jax": "0.11.2", "commit": "0123abc"}
    (run / "environment.json").write_text(
        json.dumps({**environment, "kernels": {"attention": "pallas_gpu", "delta_rule": "chunked"}})
    )
    write_layers(run, layers, first_k=4)
    detector = EventDetector(layers)
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
                values |= {"loss/val": loss + 0.06, "loss/bits_per_byte": (loss + 0.06) / 2.9}
            writer.write(step, values, tokens=step * 65536, seconds=step * 0.16 + 8)
            writer.write_events(detector.update(step, loss=loss))
        for step in np.linspace(0, steps, probes).astype(int):
            arrays = make_probes(rng, layers, step / steps, onset, top, moh)
            write_probes(run, step, arrays)
            writer.write_events(detector.update(int(step), arrays))
    words = re.findall(r"\w+|[^\w]", TEXT * 8)[:tokens]
    write_attention(run, steps, make_attention(rng, layers, tokens), words)
    return run


def make_probes(rng, layers, share, onset, top, moh):
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
        "decay_horizon": np.where(linear, np.exp(3 + 2.2 * spread + 1.2 * share), np.nan),
        "write_strength": np.where(linear, 0.5 + 0.2 * share * spread + noise, np.nan),
        "state_norm": np.where(linear, 2 + 6 * share + spread, np.nan),
        "residual_top": residual[:, None] * np.array([1.0, 0.7, 0.4]),
        "residual_median": np.full(len(layers), 0.4 + 0.2 * share),
        "residual_peak": peak,
    }
    if moh:
        arrays["head_load"] = np.where(full, np.clip(0.5 + 0.45 * share * spread + noise, 0, 1), np.nan)
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

    VOID = {"meta", "img", "br", "link", "input"}

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


def test_report_of_a_full_run_is_self_contained_fast_and_small(full_run):
    start = time.perf_counter()
    path = write_report([full_run])
    assert time.perf_counter() - start < 30  # 15 s alone; the machine may be shared
    assert path == full_run / "report/index.html" and path.stat().st_size < 5e6
    text = path.read_text()
    parsed = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in parsed.addresses)
    assert "url(" not in text and "@import" not in text
    assert parsed.tags.count("img") == len(list(path.parent.glob("*.png"))) == 9
    for part in ("41.3M", "8 × NVIDIA H100", "sink onset", "loss spike", "bits per byte", "decay horizon".capitalize()):
        assert part in text

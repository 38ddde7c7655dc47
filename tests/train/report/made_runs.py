"""Run folders made up for the report's tests, with everything that a run of a hybrid can have written."""

import itertools
import json
import re

import numpy as np

from plait.configs.probe import ProbeConfig
from plait.train.probes.base import chosen, statistics
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

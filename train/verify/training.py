"""A short training on the mesh, through the loop that every run takes: its loss falls, and its speed and attention are told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from plait.configs.command_line.cli import parse_experiment
from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import presets
from plait.kernels import chosen
from plait.kernels.dispatch import forget_chosen
from plait.train.loop import train
from plait.train.run_folder.lines import METRICS
from plait.train.verify.findings import Finding

PART = "short training"
_SHOWN = {
    "throughput/tokens_per_second": "{:,.0f} tokens/s",
    "throughput/mfu": "MFU {:.1%}",
    "time/step": "{:.3g} s a step",
    "attn/entropy_mean": "attention entropy {:.3f} nats",
    "attn/sink_rate": "sink rate {:.3f}",
    "attn/max_logit": "largest logit {:.3g}",
    "residual/max": "largest activation {:.3g}",
}
"""Metrics that are told, and how."""


class Stopped(Exception):
    """A signal ended the training, of which nothing is judged then."""


def training_config(preset: str | None, words: Sequence[str], out: Path, steps: int) -> ExperimentConfig:
    """The run: a preset, or one that suits the devices, with a few steps. Raises ValueError for options that do not fit."""
    accelerator = jax.default_backend() != "cpu"
    if words and words[0] in presets():
        raise ValueError(f"{words[0]!r} is the name of a preset and no option of verify; use --preset {words[0]}")
    if preset is None:
        preset = "hybrid_340m" if accelerator else "lm_tiny"
        if accelerator:  # bytes, for which no tokenizer must be learned
            words = ["--data.tokenizer=byte", "--data.vocab-size=None", "--data.batch-size", str(4 * len(jax.devices())), *words]
    every = max(1, steps // 4)
    fixed = [f"--steps={steps}", f"--optimizer.warmup-steps={every}", f"--log-every={every}", f"--probe-every={every}"]
    return parse_experiment(preset, [*words, *fixed, "--eval-every=None", "--checkpoint-every=None", f"--out={out}"])


def training(config: ExperimentConfig) -> Iterator[Finding]:
    """One finding: failed where the loss is not finite or does not fall. Raises `Stopped` where a signal ended it."""
    forget_chosen()
    result = train(config)
    if not result.finished and not result.by_event:
        raise Stopped
    lines = [json.loads(line) for line in (Path(config.folder) / METRICS).read_text("utf-8").splitlines()]
    losses = [line["loss/train"] for line in lines if "loss/train" in line]
    last = {name: value for line in lines for name, value in line.items() if name in _SHOWN}
    right = len(losses) > 1 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    told = [f"loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no loss was logged"]
    told += [form.format(last[name]) for name, form in _SHOWN.items() if name in last]
    told.append("with " + ", ".join(f"{op} {names}" for op, names in chosen().items()))
    yield Finding(
        part=PART,
        what=f"{config.name}, {config.steps} steps of {config.data.batch_size} x {config.data.seq_len} tokens",
        by=f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        status="passed" if right else "failed",
        detail="; ".join(told),
        numbers={"loss_first": losses[0], "loss_last": losses[-1], **last} if losses else {},
    )

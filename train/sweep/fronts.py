"""What the arms of a sweep cost: fronts of the best for their cost, and the compute that a baseline would need for the same."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from plait.configs.experiment import ExperimentConfig
from plait.configs.vocabulary import with_vocabulary
from plait.models.config import LMConfig
from plait.models.lm import num_params
from plait.models.mixers.full.weighted import mean_keys
from plait.train.sweep.arms import Arm, Estimate, estimate
from plait.train.sweep.better import Better
from plait.train.sweep.runs import Run
from plait.train.sweep.workers import claims

TOKENIZER_ELSEWHERE = 32_768
"""Stands for a vocabulary that only the corpus can tell."""
Cost = Literal["flops", "state", "params", "density"]


def settled(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its vocabulary settled."""
    return with_vocabulary(config, elsewhere=TOKENIZER_ELSEWHERE)


def step_flops(config: ExperimentConfig) -> float:
    """Of a training step: three times those of the forward pass."""
    data = config.data
    return 3 * data.batch_size * data.seq_len * _flops(settled(config).model, data.seq_len)


def flops(config: ExperimentConfig) -> float:
    """Of training, all steps."""
    return config.steps * step_flops(config)


def state(config: ExperimentConfig) -> float:
    """Bytes of the decode state of one sequence as long as a row."""
    return _state(settled(config).model, config.data.seq_len)


def params(config: ExperimentConfig) -> float:
    """Parameters of the model."""
    return _params(settled(config).model)


def density(config: ExperimentConfig) -> float:
    """Forward operations of tokens with others in full and sparse layers, scores by which some choose them included, over those of softmax
    attention to all with as many heads of their width; 0 where there is no such layer."""
    model, length = settled(config).model, config.data.seq_len
    return _density(model, length)


_flops = functools.lru_cache(LMConfig.flops)  # of a sweep's runs many have one model
_params = functools.lru_cache(num_params)


@functools.lru_cache
def _state(model: LMConfig, length: int) -> float:
    mixers = sum(one.state_bytes(model.d_model, length, model.compute_dtype) for one in model.layer_mixers)
    return mixers + sum(one.state_bytes(model.d_model, model.compute_dtype) for one in model.layer_channel_mixers)


@functools.lru_cache
def _density(model: LMConfig, length: int) -> float:
    layers = [(one, width) for one in model.layer_mixers if one.kind in ("full", "sparse") and (width := one.head_channels)]
    full = sum(2.0 * one.head_count(model.d_model) * width * mean_keys(length) for one, width in layers)
    return sum(one.between_flops(model.d_model, length) for one, _ in layers) / full if layers else 0.0


COSTS: Mapping[Cost, tuple[Callable[[ExperimentConfig], float], str]] = {
    "flops": (flops, "training FLOPs"),
    "state": (state, "bytes of decode state for a row"),
    "params": (params, "parameters"),
    "density": (density, "density of attention"),
}
"""What each is, and its words."""


def cost(arm: Arm, kind: Cost) -> float:
    """That of a run of the arm: seeds change none."""
    return float(COSTS[kind][0](next(iter(arm.runs.values())).config))


def front(points: Sequence[tuple[float, float]], sense: Better) -> list[int]:
    """The points (cost, value) that no other beats: none costs less or as much and is better, nor costs less and is as good. By rising cost."""
    sign = 1 if sense == "lower" else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    kept: list[int] = []
    best = math.inf
    for i in order:
        value = sign * points[i][1]
        same = bool(kept) and points[kept[-1]] == points[i]
        if value < best or same:
            kept.append(i)
            best = value
    return kept


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """Of an arm over its baseline: the FLOPs that the baseline takes to be as good as the arm is at its end, over those of the arm."""

    factor: Estimate
    """Geometric mean over the seeds of both, `half` of its logarithm."""
    at_least: bool
    """Whether the baseline of some seed never was so good, and the FLOPs that it did take stand for those that it would."""
    at_most: bool = False
    """Whether the baseline of some seed was so good when the metric was first logged, and may have been before."""
    worse: bool = False
    """Whether the arm ends worse than the baseline in the mean over the seeds of both."""


def speed_up(folder: Path, arm: Arm, baseline: Arm, metric: str, sense: Better) -> SpeedUp:
    """Over the seeds of both, from the curves that the baseline's runs logged."""
    run, other = (next(iter(one.runs.values())).config for one in (arm, baseline))
    ratio = step_flops(other) / flops(run)
    both = [seeds for seeds in arm.values if seeds in baseline.values]
    logs, at_least, at_most = [], False, False
    for seeds in both:
        steps, reached, first = _needed(folder, baseline.runs[seeds], metric, arm.values[seeds], sense)
        if steps:
            logs.append(math.log(steps * ratio))
            at_least |= not reached
            at_most |= first
    behind = sum(arm.values[seeds] - baseline.values[seeds] for seeds in both) * (1 if sense == "lower" else -1)
    return SpeedUp(estimate(logs), at_least, at_most, behind > 0)


def _needed(folder: Path, run: Run, metric: str, value: float, sense: Better) -> tuple[float, bool, bool]:
    """Steps after which a run first had a metric as good as `value`, whether it had (else those that it took), and whether it was better when
    it was first logged, before which it counts as no better. Between two logged values it falls in a straight line over the logarithm of the
    steps. 0 where none was logged."""
    sign = 1 if sense == "lower" else -1
    curve = [(step, sign * one) for step, one in claims.logged(folder, run, metric) if one is not None and step > 0]
    before: tuple[int, float] | None = None
    for step, one in curve:
        if one <= sign * value:
            if before is None:
                return float(step), True, one < sign * value
            share = (before[1] - sign * value) / (before[1] - one)
            return math.exp(math.log(before[0]) + share * math.log(step / before[0])), True, False
        before = step, one
    return (float(curve[-1][0]) if curve else 0.0), False, False

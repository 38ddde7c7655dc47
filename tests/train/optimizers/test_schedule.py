"""Learning rates worked out by hand."""

import math

import numpy as np
import pytest

from plait.configs.optimizer import optimizer
from plait.train.optimizers.schedule import make_schedule

HALF_COSINE = 0.5 * (1 + math.cos(math.pi * 0.5))  # half way down
CASES = {
    # steps are counted from 0: the first update uses rate(0)
    "warm-up rises in equal parts": ("constant", 4, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
    "no warm-up": ("constant", 0, {0: 1.0, 50: 1.0}),
    "one step of warm-up": ("constant", 1, {0: 1.0, 1: 1.0}),
    "cosine": ("cosine", 20, {19: 1.0, 59: 0.1 + 0.9 * HALF_COSINE, 99: 0.1}),
    "cosine without warm-up": ("cosine", 0, {0: 1.0, 33: 0.1 + 0.9 * 0.75, 99: 0.1}),
    "wsd": ("wsd", 20, {19: 1.0, 20: 1.0, 79: 1.0, 80: 0.955, 89: 0.55, 99: 0.1}),
    "wsd without warm-up": ("wsd", 0, {0: 1.0, 79: 1.0, 89: 0.55, 99: 0.1}),
}


@pytest.mark.parametrize(("schedule", "warmup", "expected"), CASES.values(), ids=CASES)
def test_schedule_at_steps_worked_by_hand(schedule, warmup, expected):
    config = optimizer("adamw", schedule=schedule, warmup_steps=warmup, final_ratio=0.1, decay_fraction=0.2)
    rate = make_schedule(config, steps=100, peak=2.0)
    found = {step: float(rate(step)) / 2.0 for step in expected}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_rates_never_jump(schedule):
    config = optimizer("adamw", schedule=schedule, warmup_steps=10, decay_fraction=0.5)
    rates = np.array([float(make_schedule(config, 50, 1.0)(step)) for step in range(50)])
    assert rates.min() > 0 and rates.max() == pytest.approx(1.0)
    assert np.abs(np.diff(rates)).max() <= 0.1 + 1e-6


def test_decay_longer_than_what_follows_the_warm_up_takes_all_of_it():
    config = optimizer("adamw", schedule="wsd", warmup_steps=60, decay_fraction=0.9, final_ratio=0.0)
    rate = make_schedule(config, 100, 1.0)
    assert float(rate(59)) == pytest.approx(1.0) and float(rate(79)) == pytest.approx(0.5) and float(rate(99)) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("rest", [1, 2, 50])
def test_last_step_has_the_last_rate(schedule, warmup, rest):
    config = optimizer("adamw", schedule=schedule, warmup_steps=warmup, final_ratio=0.1)
    steps = max(warmup, 1) + rest
    rate = make_schedule(config, steps, 3.0)
    assert float(rate(max(warmup - 1, 0))) == pytest.approx(3.0) and float(rate(steps - 1)) == pytest.approx(0.3)
    assert float(rate(steps)) == pytest.approx(0.3)  # where skipped steps made the run longer

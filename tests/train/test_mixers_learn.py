"""Every mixer, alone and three to one with softmax, learns to copy in bfloat16, by the trainer that a user runs."""

import dataclasses

import numpy as np
import pytest

from plait.data.tasks.copying import CopyingTask
from plait.models.mixers.base import MIXERS, MixerConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.train.common import changed, tiny
from plait.train.loop import train
from plait.train.run_folder.lines import read_metrics, series

STRING = 4
STEPS, MORE_ALONE = 300, {"aaren": 1500, "memora": 900, "yaad": 900}
"""Steps of training; what these need where no softmax layer helps them."""


def copying(mixer: MixerConfig, pattern: str, out, steps: int = STEPS):
    """`tiny`, as wide as the mixer's example is for, on strings of four out of eight symbols, loss in bfloat16."""
    softmax = SoftmaxConfig.example()
    name = mixer.name if not hasattr(mixer, "mixer") else f"{mixer.name}+{mixer.mixer.name}"
    mixers = {name: mixer, "softmax": softmax} if "softmax" in pattern and name != "softmax" else {name: mixer}
    config = tiny(
        {
            "data.task": CopyingTask(num_symbols=8, length=STRING, val_rows=256),
            "data.seq_len": 12,
            "data.batch_size": 64,
            "steps": steps,
            "optimizer.learning_rate": 5e-3,
            "optimizer.warmup_steps": 20,
            "log_every": 10,
            "out": str(out),
        }
    )
    pattern = pattern.format(name) if name != "softmax" else "softmax"
    model = dataclasses.replace(
        config.model, d_model=64, num_layers=4 if "," in pattern else 2, pattern=pattern, mixers=mixers, compute_dtype="bfloat16"
    )
    return changed(config, {"model": model})


LEARNING = [name for name, mixer in MIXERS.all().items() if "causal" in mixer.example().directions and name != "transfer"]
"""Mixers that can be causal, but for `transfer`, in which a teacher is not trained."""


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["{}", "{}*3,softmax"], ids=["alone", "hybrid"])
@pytest.mark.parametrize("name", LEARNING)
def test_mixer_learns_to_copy(name, pattern, tmp_path):
    steps = MORE_ALONE.get(name, STEPS) if pattern == "{}" else STEPS
    result = train(copying(MIXERS[name].example(), pattern, tmp_path / "run", steps))
    records = read_metrics(tmp_path / "run")
    for metric in ("loss/train", "grad/norm"):
        _, values = series(records, metric)
        assert len(values) >= 30 and np.isfinite(values).all(), metric
    assert result.metrics["task/copying/accuracy"] > 0.95

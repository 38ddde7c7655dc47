"""The preset `lm_sinks`: its sink emerges, the report says when, and attention that has no need of one ends without."""

import numpy as np
import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.tests.train.test_resume import lines_of
from plait.train.loop import train
from plait.train.probes.sinks import THRESHOLD
from plait.train.report import write_report
from plait.train.run_folder.probe_files import read_probes

pytestmark = pytest.mark.slow


def ran(out, *more):
    """α₁ of the strongest head at each probe, and the events."""
    train(parse_experiment("lm_sinks", ["--out", str(out), *more]))
    events = out / "events.jsonl"
    return np.nanmax(read_probes(out).arrays["sink"][..., 0], axis=(1, 2)), lines_of(events) if events.exists() else []


def test_a_sink_emerges_and_the_report_tells_its_onset(compile_cache, tmp_path):
    alpha, events = ran(tmp_path / "run")
    assert alpha[0] < 0.15 and alpha[-5:].mean() > THRESHOLD
    onset = next(event for event in events if event["kind"] == "sink_onset")
    assert onset["step"] > 1
    told = f"onset was layer {onset['layer']} head {onset['head']} at step {onset['step']:,}"
    assert told in write_report([tmp_path / "run"]).read_text()


RELU = (
    "--model.pattern=relu_attention --model.mixers.relu-attention.num-heads=1 --model.mixers.relu-attention.positions=sinusoidal"
)


@pytest.mark.parametrize("instead", ["--model.mixers.softmax.normalizer=sigmoid", RELU], ids=["sigmoid", "ReLU"])
def test_attention_that_may_look_nowhere_ends_without_a_sink(instead, compile_cache, tmp_path):
    alpha, _ = ran(tmp_path / "run", *instead.split())
    assert alpha[-5:].mean() < 0.25 < THRESHOLD

"""A small real run whose attention collapses, what keeps it from that, and actions that act on it."""

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.data.loader import DataIterator
from plait.tests.train.common import changed, different_arrays
from plait.tests.train.test_resume import last_state, lines_of, terminating
from plait.train.loop import train
from plait.train.pods.hosts.failure import TrainingFailed
from plait.train.run_folder.lines import read_metrics, series

pytestmark = pytest.mark.slow

FAST = """lm_tiny --model.pattern softmax --model.num-layers 4 --optimizer.learning-rate 0.1 --optimizer.warmup-steps 0
--optimizer.schedule constant --steps 60 --probe-every 5 --log-every 1 --eval-every 60 --checkpoint-every 20"""
"""As in docs/reproductions.md, with fewer steps."""
JUMPING = (
    FAST.replace("learning-rate 0.1", "learning-rate 0.05 --model.norm none").replace("checkpoint-every 20", "checkpoint-every 5")
    + " --event.loss-spike.action rewind --spike.max-rewinds 10"
)
"""Without norms the loss jumps to thousands, with any batches."""


def ran(words, out, more=""):
    """The run's config, its events, and its metrics of probes and loss at the last step."""
    config = parse_experiment("lm_tiny", [*words.split()[1:], *more.split(), "--out", str(out)])
    train(config)
    return config, *told(out)


def told(out):
    last = lambda name: series(read_metrics(out), name)[1][-1]
    names = ("attn/entropy_ratio", "attn/max_logit", "optimizer/learning_rate", "loss/train")
    return lines_of(out / "events.jsonl") if (out / "events.jsonl").exists() else [], {name: last(name) for name in names}


@pytest.fixture(scope="module")
def collapsed(compile_cache, tmp_path_factory):
    return ran(FAST, tmp_path_factory.mktemp("collapse") / "run")


def kinds(events):
    return {event["kind"] for event in events}


def test_attention_collapses_at_a_large_rate_without_warm_up(collapsed):
    _, events, last = collapsed
    assert {"entropy_collapse", "logit_growth"} <= kinds(events)
    assert min(event["step"] for event in events) in (5, 10, 15) and len({e["layer"] for e in events}) == 4
    assert last["attn/entropy_ratio"] < 0.2 and last["attn/max_logit"] > 200


@pytest.mark.parametrize(
    "remedy",
    ["--model.sigma-reparam spectral", "--model.mixers.softmax.qk-norm", "--optimizer.learning-rate 0.01"],
    ids=["sigmaReparam", "QK-norm", "a tenth of the rate"],
)
def test_attention_does_not_collapse_with(remedy, collapsed, compile_cache, tmp_path):
    _, events, last = ran(FAST, tmp_path / "run", remedy)
    assert kinds(events) == set()
    assert last["attn/entropy_ratio"] > 3 * collapsed[2]["attn/entropy_ratio"] and last["attn/max_logit"] < 50


def test_qk_clip_bounds_the_logits(collapsed, compile_cache, tmp_path):
    """To the threshold and what one step adds to it."""
    _, _, last = ran(FAST, tmp_path / "run", "--model.qk-clip.threshold 20")
    assert max(series(read_metrics(tmp_path / "run"), "attn/max_logit")[1]) < 100 < 0.5 * collapsed[2]["attn/max_logit"]
    assert last["attn/entropy_ratio"] > 2 * collapsed[2]["attn/entropy_ratio"]


def test_a_lower_rate_ends_the_growth_and_lasts_through_a_stop(collapsed, compile_cache, tmp_path, monkeypatch):
    lower = "--event.logit-growth.action lower_rate --event.logit-growth.factor 0.1"
    config, events, last = ran(FAST, tmp_path / "whole", lower)
    times = sum("times what it was" in event["message"] for event in events)
    assert last["optimizer/learning_rate"] == pytest.approx(0.1 * 0.1**times) and times
    assert last["attn/max_logit"] < 0.7 * collapsed[2]["attn/max_logit"]
    config = changed(config, {"out": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(30))
        assert train(config).step == 30
    assert train(changed(config, {"resume": True})).finished
    assert different_arrays(last_state(tmp_path / "run"), last_state(tmp_path / "whole")) == []
    for name in ("metrics.jsonl", "events.jsonl"):
        assert lines_of(tmp_path / "run" / name) == lines_of(tmp_path / "whole" / name), name


def test_rewinds_that_lower_the_rate_save_a_run_that_other_batches_do_not(compile_cache, tmp_path, monkeypatch):
    """And do so alike in a run that was stopped between them."""
    with pytest.raises(TrainingFailed, match=r"spike\.max_rewinds=10"):
        ran(JUMPING, tmp_path / "alone")
    config, events, last = ran(JUMPING, tmp_path / "whole", "--event.rewind.action lower_rate")
    assert "rewind" in kinds(events) and last["loss/train"] < 4 and last["optimizer/learning_rate"] < 0.03
    config = changed(config, {"out": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(DataIterator, "__next__", terminating(20))
        assert not train(config).finished
    assert train(changed(config, {"resume": True})).finished
    assert different_arrays(last_state(tmp_path / "run"), last_state(tmp_path / "whole")) == []

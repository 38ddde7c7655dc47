"""Longer runs and branches: where the learning rate of what is done stays, they are the undisturbed longer run bit for bit."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.launch import main
from plait.tests.train.common import changed, tiny
from plait.tests.train.test_resume import assert_same_run
from plait.train.loop import train
from plait.train.optimizers.schedule import make_schedule
from plait.train.run_folder.branch import Fork
from plait.train.run_folder.contents import RunError
from plait.train.run_folder.going_on import check_goes_on, steps_alike
from plait.train.run_folder.lines import read_metrics

SHORT, LONG, FORK = 16, 28, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus) -> ExperimentConfig:
    """Decays over its last half, from step 9 on; its longer form from step 15 on."""
    folder = tmp_path_factory.mktemp("branch")
    return tiny(
        {
            "steps": SHORT,
            "log_every": 2,
            "probe_every": 4,
            "eval_every": 8,
            "eval_batches": 1,
            "checkpoint_every": 4,
            "keep_last": 9,
            "optimizer.ema": 0.9,
            "optimizer.schedule": "wsd",
            "optimizer.decay_fraction": 0.5,
            "data.source": str(corpus),
            "data.cache_dir": str(folder / "cache"),
            "out": str(folder / "short"),
        }
    )


@pytest.fixture(scope="module")
def short(config, compile_cache) -> Path:
    train(config)
    return Path(config.folder)


@pytest.fixture(scope="module")
def long(config, compile_cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long") / "undisturbed"
    train(changed(config, {"steps": LONG, "out": str(out)}))
    return out


def test_a_branch_is_the_undisturbed_longer_run(short, long, tmp_path, capsys):
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file()}
    words = ["train", "--branch", f"{short}/checkpoints/{FORK}", "--steps", str(LONG), "--out", str(tmp_path / "new")]
    assert main(words) == 0
    assert_same_run(tmp_path / "new", long)
    assert {path: path.read_bytes() for path in before} == before, "the other run stays"
    assert main(words) == 2 and "is used; give a new folder, or go on in it with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0, "as a supervisor starts it again"
    assert_same_run(tmp_path / "new", long)


def test_a_run_that_stopped_on_its_plateau_goes_on_to_more_steps(config, short, long, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(short, out)
    for step in (12, 16):
        shutil.rmtree(out / "checkpoints" / str(step))
    train(changed(config, {"steps": LONG, "out": str(out), "resume": True}))
    assert_same_run(out, long)
    assert codec.load(ExperimentConfig, out / "config.json").steps == LONG


def test_a_branch_reads_other_data_from_its_beginning(config, short, tmp_path, capsys, caplog):
    """With weights and optimizer as they were; killed before its first checkpoint it begins so again."""
    other = tmp_path / "other.txt"
    other.write_text("The house is old, and the river is high. " * 400)
    rows = ["--data.source", str(other), "--data.seq-len", "24", "--steps", str(SHORT)]
    words = ["train", "--branch", f"{short}/checkpoints/{FORK}", *rows, "--out", str(tmp_path / "new")]
    assert main(words) == 0
    new, old = ({line["step"]: line for line in read_metrics(folder)} for folder in (tmp_path / "new", short))
    assert all(new[step] == old[step] for step in old if step <= FORK) and max(new) == SHORT
    first = FORK + 2
    assert new[first]["loss/train"] != old[first]["loss/train"]
    assert new[first]["optimizer/learning_rate"] == old[first]["optimizer/learning_rate"]
    assert new[SHORT]["tokens"] - new[FORK]["tokens"] <= (SHORT - FORK) * config.data.batch_size * 24
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "new", again)
    for step in (12, 16):
        shutil.rmtree(again / "checkpoints" / str(step))
    assert main([*words[:-1], str(again), "--resume"]) == 0
    assert_same_run(again, tmp_path / "new")
    capsys.readouterr()
    foreign = [*words[:-1], str(tmp_path / "foreign"), "--data.tokenizer", "bpe"]
    assert main(foreign) == 2 and "data.tokenizer" in capsys.readouterr().err and not (tmp_path / "foreign").exists()


def test_steps_that_are_done_do_not_change(config, short):
    with pytest.raises(
        RunError, match=rf"steps=28 gives another learning rate .* from step 9 on .*--branch {short}/checkpoints/8"
    ):
        train(changed(config, {"steps": LONG, "resume": True}))
    with pytest.raises(RunError, match=r"steps=12 is below the 16 that .* has done; use --steps 16 or more"):
        train(changed(config, {"steps": 12, "resume": True}))
    assert codec.load(ExperimentConfig, short / "config.json").steps == SHORT


@pytest.mark.parametrize(("schedule", "alike"), [("constant", 100), ("wsd", 80), ("cosine", 4)])
def test_schedules_tell_how_far_two_lengths_are_alike(schedule, alike, config):
    """WSD: the last 20 of 100 steps decay; a cosine leaves the peak, which the fourth step has, at once."""
    one = changed(
        config, {"steps": 100, "optimizer.schedule": schedule, "optimizer.decay_fraction": 0.2, "optimizer.warmup_steps": 4}
    )
    other = changed(one, {"steps": 200})
    short, long = (make_schedule(config.optimizer, config.steps, 1.0)(jnp.arange(100)) for config in (one, other))
    np.testing.assert_array_equal(np.broadcast_to(short == long, 100), np.arange(100) < alike)
    assert steps_alike(one, other, 100) == alike
    assert steps_alike(one, one, 100) == 100


def test_another_decay_is_alike_until_one_of_the_two_begins(config):
    one = changed(config, {"steps": 100, "optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2})
    for other, alike in (
        ({"optimizer.decay_fraction": 0.5}, 50),
        ({"optimizer.final_ratio": 0.0}, 80),
        ({"optimizer.schedule": "constant"}, 80),
    ):
        assert steps_alike(one, changed(one, other), 100) == alike
        check_goes_on(one, changed(one, other), alike, Path("run"), branch=True)
        with pytest.raises(
            RunError, match=rf"optimizer\.\w+=\S+ gives another learning rate than optimizer\.\w+=\S+ from step {alike + 1} on"
        ):
            check_goes_on(one, changed(one, other), alike + 1, Path("run"), branch=True)


@pytest.mark.slow
def test_a_branch_decays_otherwise_than_its_run(config, short, tmp_path):
    fall = {"optimizer.decay_fraction": 0.4, "optimizer.final_ratio": 0.0}
    train(changed(config, {"steps": LONG, "out": str(tmp_path / "whole"), **fall}))
    words = [word for key, value in fall.items() for word in (f"--{key}", str(value))]
    at = ["train", "--branch", f"{short}/checkpoints/{FORK}", "--steps", str(LONG)]
    assert main([*at, *words, "--out", str(tmp_path / "new")]) == 0
    assert_same_run(tmp_path / "new", tmp_path / "whole")


WRONG = {
    "no checkpoint": ("{run}", r"branch=.* must be RUN/checkpoints/STEP of a training run"),
    "another step": ("{run}/checkpoints/5", r"is not there; use one of the steps 4, 8, 12, 16"),
    "no run": ("nowhere/checkpoints/5", r"must be RUN/checkpoints/STEP"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_checkpoint_is_named(text, message, short):
    with pytest.raises(RunError, match=message):
        Fork.of(text.format(run=short))


def test_nothing_is_made_where_a_branch_is_refused(config, short, tmp_path, capsys):
    at = f"{short}/checkpoints/{FORK}"
    for words, message in {
        ("lm_tiny", "--branch", at, "--out", "new"): "leave 'lm_tiny' out",
        ("--branch", at): "needs a folder of its own; give --out",
        ("--branch", at, "--out", f"{tmp_path}/new", "--seed", "3"): "was started with another config: seed: 0 -> 3",
        ("--branch", f"{short}/checkpoints/16", "--out", f"{tmp_path}/new", "--steps", "28"): "gives another learning rate",
    }.items():
        assert main(["train", *words]) == 2
        assert message in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(short, damaged)
    next((damaged / "checkpoints" / "8" / "state").rglob("d/*")).write_bytes(b"")
    with pytest.raises(RunError, match=r"is damaged: .*; use another checkpoint"):
        Fork.of(f"{damaged}/checkpoints/8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
    check_goes_on(config, changed(config, {"steps": LONG, "keep_last": 1}), FORK, short)

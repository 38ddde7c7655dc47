"""Runs that begin with the weights of another: which they take, from whom they refuse, and that they go on by themselves."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.launch import main
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.tests.train.common import changed, different_arrays, tiny
from plait.train import origin as origins
from plait.train import run as runs
from plait.train.checkpoint import Checkpoints
from plait.train.loop import train


@pytest.fixture(scope="module")
def before(corpus, tmp_path_factory, compile_cache):
    """A run of four steps with a checkpoint after two, and its averaged parameters after each."""
    folder = tmp_path_factory.mktemp("before") / "run"
    config = tiny(
        {"data.source": str(corpus), "out": str(folder), "steps": 4, "checkpoint_every": 2, "optimizer.ema": 0.5, "keep_last": 3}
    )
    train(config)
    return config, {step: runs.opened(folder, step).params for step in (2, 4)}


def after(before, folder, changes=None):
    config, _ = before
    changes = {"init_from": config.folder, "data.tokenizer": config.folder, "optimizer.ema": None, **(changes or {})}
    return changed(config, {"out": str(folder), **changes})


LAYOUTS = {
    "one device": {},
    "sharded and in bfloat16": {"mesh.fsdp": 2, "mesh.tensor": 2, "model.param_dtype": "bfloat16", "optimizer.ema": 0.9},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_begins_with_the_weights_alone(changes, before, tmp_path):
    config = origins.settled(after(before, tmp_path / "run", changes))
    setup = runs.set_up(config)
    state, new = origins.begin(setup, config.init_from), setup.fresh()
    wanted = {name: np.asarray(value.astype(config.model.param_dtype)) for name, value in before[1][4].items()}
    assert different_arrays(state.params, wanted) == []
    assert different_arrays((state.step, state.optimizer, state.skipped), (new.step, new.optimizer, new.skipped)) == []
    assert jax.tree.map(lambda a: (a.dtype, a.sharding), state) == jax.tree.map(lambda a: (a.dtype, a.sharding), new)
    if config.optimizer.ema is not None:
        assert different_arrays(state.ema, {name: np.asarray(value, np.float32) for name, value in wanted.items()}) == []
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["step"] == 4


def test_one_checkpoint_is_named_by_its_folder_and_kept_to(before, tmp_path):
    config = origins.settled(after(before, tmp_path / "run", {"init_from": f"{before[0].folder}/checkpoints/2"}))
    setup = runs.set_up(config)
    assert different_arrays(origins.begin(setup, config.init_from).params, before[1][2]) == []
    # As after a kill before the first checkpoint, when the origin has gone on.
    assert different_arrays(origins.begin(setup, before[0].folder).params, before[1][2]) == []


def test_the_run_goes_on_from_its_own_checkpoints(before, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(before[0].folder, origin)
    config = after(before, tmp_path / "run", {"init_from": str(origin), "data.tokenizer": "byte"})
    config = changed(config, {"model.vocab_size": None})
    train(config)
    whole = runs.opened(config.folder)
    assert whole.step == 4 and different_arrays(whole.params, before[1][4]) != []
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(origin)
    train(changed(config, {"resume": True}))
    assert different_arrays(runs.opened(config.folder).params, whole.params) == []


REFUSED = {
    "a width": ({"model.d_model": 32}, "model.d_model: 16 -> 32"),
    "an option of a mixer": ({"model.mixers.softmax.window_size": 4}, "model.mixers.softmax.window_size: null -> 4"),
    "a channel mixer": (
        {"model.channel_mixer": GatedMLPConfig(hidden_dim=24, activation="relu")},
        "model.channel_mixer.activation",
    ),
    "a vocabulary": ({"model.vocab_size": 1024}, "model.vocab_size: 384 -> 1024"),
    "a learned tokenizer": ({"data.tokenizer": "bpe"}, "data.tokenizer='bpe' learns a vocabulary, .*use --data.tokenizer /"),
    "a folder that is no run": ({"init_from": "/nowhere"}, "init_from='/nowhere' must be a run folder .*convert import"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(changes, message, before, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(after(before, tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there(before, tmp_path):
    text = f"{before[0].folder}/checkpoints/3"
    with pytest.raises(runs.RunError, match="has no checkpoint of step 3; use one of 2, 4"):
        origins.settled(after(before, tmp_path / "run", {"init_from": text}))


def test_another_tokenizer_is_refused(before, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(
        runs.opened(before[0].folder).tokenizer.to_json().replace('"b":98', '"b":99').replace('"c":99', '"c":98')
    )
    with pytest.raises(runs.RunError, match=r"data.tokenizer=.* is another one than that of init_from=.*--data.vocab-size None"):
        origins.settled(after(before, tmp_path / "run", {"data.tokenizer": str(other)}))


def test_options_of_training_may_differ(before, tmp_path):
    free = {
        "model.remat": "full",
        "model.z_loss": 1e-4,
        "model.qk_clip.threshold": 90.0,
        "model.attention_loss.entropy": 1e-3,
        "model.pattern": "softmax*2",
        "model.mixers.softmax.num_kv_heads": 2,
    }
    origins.settled(after(before, tmp_path / "run", free))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_longer_rows_are_refused_where_layers_know_their_length(normalizer, before, tmp_path):
    config = changed(before[0], {"model.mixers.softmax.normalizer": normalizer})
    origin = origins.Origin(
        "runs/a", tmp_path, None, changed(config, {"model.vocab_size": 384}), runs.described(Path(config.folder))[1]
    )
    longer = changed(config, {"data.seq_len": 32})
    if normalizer == "softmax":
        origin.check(longer)
    else:
        with pytest.raises(runs.RunError, match=r"data.seq_len=32 makes another function .* use --data.seq-len 16"):
            origin.check(longer)


def test_sigma_reparam_comes_and_goes_with_the_same_function(before, tmp_path, compile_cache):
    """A run with gains begins as the plain one, and a plain one from that as it."""
    states = []
    for number, sigma in enumerate((None, "one", None)):
        text = before[0].folder if number < 2 else str(tmp_path / "1")
        config = origins.settled(after(before, tmp_path / str(number), {"model.sigma_reparam": sigma, "init_from": text}))
        setup = runs.set_up(config)
        state = origins.begin(setup, text)
        states.append(setup.blueprint.build(state.params, state.buffers).stack.periods[0].mixer.q.weight())
        if number == 1:
            codec.save(config, tmp_path / "1" / "config.json")
            checkpoints = Checkpoints(tmp_path / "1" / "checkpoints")
            checkpoints.save(0, state, {}, loss=None)
            checkpoints.close()
    from plait.tests.tolerances import assert_close

    for found in states[1:]:
        assert_close(found, states[0])


def test_one_command_goes_on_with_a_run(before, corpus, tmp_path, capsys):
    words = ["--init-from", before[0].folder, "--steps", "2", "--mesh.data", "1", "--probe-every", "None", "--eval-batches", "1"]
    words += ["--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    config = codec.load(ExperimentConfig, tmp_path / "run" / "config.json")
    assert (config.model.vocab_size, config.data.tokenizer, config.data.source) == (384, before[0].folder, str(corpus))
    assert main(["train", *words]) == 2
    assert "already holds a run; use --resume" in capsys.readouterr().err
    assert main(["train", *words, "--resume"]) == 0


def test_neither_preset_nor_origin(capsys):
    assert main(["train", "--steps", "3"]) == 2
    assert "needs a preset first, as in 'launch.py train lm_quick', or --init-from RUN" in capsys.readouterr().err

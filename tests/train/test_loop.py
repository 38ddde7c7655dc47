"""The training loop: what each of its options does, what it writes, and how it ends."""

import contextlib
import itertools
import json
import os
import signal
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.configs.spike import SpikeConfig
from plait.launch import main
from plait.models.lm import num_params
from plait.tests.train.common import changed, routed
from plait.train import run as runs
from plait.train.loop import TrainingFailed, train
from plait.train.loss import loss_terms
from plait.train.pods.hosts.layout import BatchLayout
from plait.train.probes.base import chosen, statistics
from plait.train.run_folder import seal
from plait.train.run_folder.lines import read_metrics, series
from plait.train.run_folder.probe_files import probe_files
from plait.train.scoring.evaluate import Evaluator
from plait.train.watching.spikes import SpikeWatch


@pytest.fixture(scope="module")
def base(compile_cache, corpus):
    """Six steps on a small corpus, held-out text and probes; `out` differs from test to test."""
    return routed({"data.source": str(corpus), "probe_every": 3, "eval_every": 3, "checkpoint_every": 2})


def trained(config, out, **changes):
    """The result of a run in `out`."""
    return train(changed(config, {"out": str(out), **{name.replace("__", "."): value for name, value in changes.items()}}))


def steps_with(folder, metric):
    return series(read_metrics(folder), metric)[0].tolist()


def checkpoints_of(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return trained(base, out), out


def test_a_run_folder_holds_everything(finished, base):
    result, out = finished
    assert result.finished and result.step == 6 and result.folder == out
    there = {p.name for p in out.iterdir()}
    assert there >= {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "probes",
        "checkpoints",
        "tensorboard",
        "tokenizer",
    }
    facts = json.loads((out / "environment.json").read_text())
    assert facts["devices"]["platform"] == "cpu" and set(facts["mesh"].values()) == {1}
    assert facts["kernels"]["attention"] and facts["data"]["seq_len"] == 16 and facts["flops_per_token"] > 0
    assert facts["num_params"] == num_params(base.model.with_vocab(257))
    layers = json.loads((out / "probes" / "layers.json").read_text())["layers"]
    assert [layer["mixer"] for layer in layers] == ["moh+softmax"]
    assert (out / "probes" / "attention.npz").exists() and (out / "data").is_dir()


def test_metrics_of_every_step_are_there_once_and_in_order(finished):
    _, out = finished
    records = read_metrics(out)
    assert steps_with(out, "loss/train") == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    tokens, seconds = [r["tokens"] for r in records], [r["seconds"] for r in records]
    assert tokens == sorted(tokens) and tokens[0] == 64 and seconds == sorted(seconds)
    expected = {"loss/train", "loss/balance/moh", "grad/norm", "optimizer/learning_rate", "optimizer/skipped_steps", "time/step"}
    assert all(expected <= record.keys() for record in records if "loss/train" in record)
    probed = next(r for r in records if r["step"] == 3 and "loss/train" in r)
    assert {
        "attn/entropy_mean",
        "attn/entropy_ratio",
        "attn/max_logit",
        "moh/max_load",
        "residual/max",
        "residual/massive",
    } <= probed.keys()
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_run_is_the_same_twice(finished, base, tmp_path):
    trained(base, tmp_path / "again")
    times = ("seconds", "time/", "throughput/")
    first, second = (
        [{k: v for k, v in r.items() if not k.startswith(times)} for r in read_metrics(f)]
        for f in (finished[1], tmp_path / "again")
    )
    assert first == second


def test_nothing_held_out_trains_without_validation(base, tmp_path):
    result = trained(base, tmp_path / "run", data__val_fraction=0.0)
    assert result.finished and "loss/val" not in result.metrics
    assert checkpoints_of(tmp_path / "run")[-1] == 6


# One case for each leaf that steers the loop: what to change it to, and what then differs from the run `finished`. Leaves that do not
# meet in the loop differ in one run together.


@pytest.fixture(scope="module")
def several(base, finished, tmp_path_factory):
    """A run in which several leaves differ, what it sent to Weights & Biases, and the results of it and of the run `finished`."""
    out, sent = tmp_path_factory.mktemp("several") / "run", {}
    fake = types.SimpleNamespace(
        init=lambda **options: sent.update(options) or fake,
        log=lambda values, step: sent.update({step: values}),
        finish=lambda: None,
    )
    leaves = dict.fromkeys(("log_every", "probe_every", "eval_every", "checkpoint_every"), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake)
        options = {"eval_batches": 1, "keep_last": 9, "wandb": "my-project", "data__cache_dir": str(out / "cache")}
        return trained(base, out, **leaves, **options), out, sent, finished[0]


def log_every(result, out, sent, plain):
    assert steps_with(out, "time/step") == [4, 6]
    assert steps_with(out, "loss/train") == [1, 4, 6], "probed steps are always written"


def probe_every(result, out, sent, plain):
    assert [int(p.stem[-8:]) for p in probe_files(out)] == [1, 4]


def eval_every(result, out, sent, plain):
    assert steps_with(out, "loss/val") == [4, 6]


def eval_batches(result, out, sent, plain):
    assert result.metrics["loss/train"] == plain.metrics["loss/train"] and result.metrics["loss/val"] != plain.metrics["loss/val"]


def checkpoint_every(result, out, sent, plain):
    assert checkpoints_of(out) == [4, 6]


def keep_last(base, out):
    trained(base, out, keep_last=1, keep_best=0)
    assert checkpoints_of(out) == [6]


def keep_best(base, out):
    """Learning so fast that the loss rises: the best checkpoint is an early one, kept beside the newest."""
    settings = {
        "keep_last": 1,
        "probe_every": None,
        "eval_every": 1,
        "checkpoint_every": 1,
        "optimizer__learning_rate": 3.0,
        "optimizer__warmup_steps": 4,
    }
    trained(base, out, keep_best=2, **settings)
    steps, losses = series(read_metrics(out), "loss/val")
    best = {int(steps[i]) for i in np.argsort(losses)[:2]}
    assert 6 not in best and checkpoints_of(out) == sorted(best | {6})


def out_folder(result, out, sent, plain):
    assert result.folder == out != plain.folder and (out / "config.json").exists()


def test_a_run_has_a_folder_where_none_is_named(base):
    assert changed(base, {"out": None}).folder == "runs/tiny"


def resume(base, out):
    trained(base, out)
    with pytest.raises(runs.RunError, match="--resume"):
        trained(base, out)
    assert trained(base, out, resume=True).step == 6


def wandb(result, out, sent, plain):
    assert sent["project"] == "my-project" and sent["config"]["steps"] == 6 and "loss/val" in sent[6]


def max_bad_steps(base, out):
    for limit in (2, 3):
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(TrainingFailed, match=f"the last {limit} steps up to {limit + 2}"),
        ):
            poison_losses(patch, 3)
            trained(plain_steps(base), out / str(limit), optimizer__max_bad_steps=limit, steps=20)


@contextlib.contextmanager
def spiking_at(step):
    """No loss of that step is low enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpikeWatch, "bounds", lambda self, at: np.full(2, 0.0 if at == step else np.inf, np.float32))
        yield


def spike_sigma(base, out):
    with spiking_at(5):
        assert trained(plain_steps(base), out / "never").metrics["optimizer/skipped_steps"] == 0
        assert trained(plain_steps(base), out / "looking", spike__sigma=6.0).metrics["optimizer/skipped_steps"] == 1


def spike_window(base, out):
    wide, narrow = (SpikeWatch(SpikeConfig(sigma=1.0, window=window)) for window in (16, 4))
    for watch in (wide, narrow):
        for step in range(1, 30):
            watch.note(step, float(step), 1.0)
    assert wide.bounds(30)[0] < narrow.bounds(30)[0]


def spike_action(base, out):
    with spiking_at(5), pytest.raises(TrainingFailed, match=r"step 5 .* rewinds"):
        trained(base, out, spike__sigma=6.0, spike__action="rewind")
    with pytest.raises(ValueError, match=r"spike\.action=rewind needs checkpoints"):
        trained(plain_steps(base), out, spike__sigma=6.0, spike__action="rewind")


def spike_max_rewinds(base, out):
    with spiking_at(5), pytest.raises(TrainingFailed, match=r"after spike\.max_rewinds=3 rewinds"):
        trained(base, out, spike__sigma=6.0, spike__action="rewind", spike__max_rewinds=3)


def cache_dir(result, out, sent, plain):
    assert not (out / "data").exists()
    assert list((out / "cache").glob("tokens-*"))


def init_from(base, out):
    base, further = plain_steps(base), out.with_name("further")
    trained(base, out, steps=4)
    trained(base, further, steps=3, init_from=str(out))
    first, second = (series(read_metrics(folder), "loss/train")[1][0] for folder in (out, further))
    assert second < first


LOOP = {
    "init_from": init_from,
    "log_every": log_every,
    "probe_every": probe_every,
    "eval_every": eval_every,
    "eval_batches": eval_batches,
    "checkpoint_every": checkpoint_every,
    "keep_last": keep_last,
    "keep_best": keep_best,
    "out": out_folder,
    "resume": resume,
    "wandb": wandb,
    "optimizer.max_bad_steps": max_bad_steps,
    "spike.sigma": spike_sigma,
    "spike.window": spike_window,
    "spike.action": spike_action,
    "spike.max_rewinds": spike_max_rewinds,
    "data.cache_dir": cache_dir,
}
TOGETHER = (log_every, probe_every, eval_every, eval_batches, checkpoint_every, out_folder, wandb, cache_dir)


def test_every_leaf_of_the_loop_has_a_case():
    from plait.tests.configs import test_leaves

    assert set(LOOP) == test_leaves.LOOP


@pytest.mark.parametrize("case", LOOP.values(), ids=LOOP)
def test_option_of_the_loop(case, base, several, tmp_path):
    case(*several) if case in TOGETHER else case(base, tmp_path / "run")


def test_only_the_named_probes_run(base, tmp_path):
    trained(base, tmp_path / "run", probe__only="entropy,residual")
    with np.load(probe_files(tmp_path / "run")[0]) as arrays:
        assert set(arrays.files) == set(statistics(chosen("entropy,residual")))
    with pytest.raises(ValueError, match=r"probe\.only='entropie': probe 'entropie' is not registered; did you mean 'entropy'"):
        trained(base, tmp_path / "wrong", probe__only="entropie")
    assert not (tmp_path / "wrong").exists(), "a folder that a wrong name has made would bind the next try"


def plain_steps(config):
    """Without probes, validations and checkpoints on the way, where they are not what is looked at."""
    return changed(config, {"probe_every": None, "eval_every": None, "checkpoint_every": None})


def poison_losses(patch, first, last=99):
    """Makes the loss of the batches numbered `first` to `last` not a number: their mask is doubled as a sign to the loss."""
    count, place = itertools.count(1), BatchLayout.place

    def placing(layout, batch):
        marked = first <= next(count) <= last
        return place(layout, batch._replace(loss_mask=batch.loss_mask * np.float32(2)) if marked else batch)

    def losing(model, batch, **options):
        loss, terms = loss_terms(model, batch, **options)
        return loss * jnp.where(batch.loss_mask.max() > 1, jnp.nan, 1.0), terms

    patch.setattr(BatchLayout, "place", placing)
    patch.setattr("plait.train.step.loss_terms", losing)


def test_a_few_bad_steps_are_skipped_counted_and_survived(base, tmp_path, monkeypatch):
    poison_losses(monkeypatch, 3, 4)
    result = trained(plain_steps(base), tmp_path / "run", optimizer__max_bad_steps=3, log_every=1)
    assert result.finished and np.isfinite(result.metrics["loss/train"])
    records = read_metrics(tmp_path / "run")
    assert [r["optimizer/skipped_steps"] for r in records if "loss/train" in r] == [0, 0, 1, 2, 2, 2]


def test_too_many_bad_steps_end_the_command_with_status_1(base, tmp_path, monkeypatch, capsys, corpus):
    """The last good parameters stay in the checkpoint before, and --resume goes on from there."""
    words = (
        "train lm_tiny --model.pattern softmax --steps 30 --checkpoint-every 2 --probe-every None --eval-every None --mesh.data 1"
    )
    words += f" --optimizer.max-bad-steps 3 --optimizer.warmup-steps 2 --data.source {corpus} --data.val-fraction 0"
    words += f" --out {tmp_path}/run"
    with monkeypatch.context() as patch:
        poison_losses(patch, 5)
        assert main(words.split()) == 1
    message = capsys.readouterr().err
    assert (
        message.startswith("error: the last 3 steps up to 7")
        and "optimizer.max_bad_steps=3" in message
        and "Traceback" not in message
    )
    kept = checkpoints_of(tmp_path / "run")
    assert kept and max(kept) <= 6


@pytest.mark.parametrize("where", ["validation", "checkpoint"])
def test_sigterm_while_validating_or_saving_still_saves(where, base, tmp_path, monkeypatch):
    """Whenever the signal comes, the step that `stopped and saved at step N` names is on disk."""
    from plait.train import loop

    target = {"validation": (Evaluator, "__call__"), "checkpoint": (loop.Checkpoints, "save")}[where]
    original = getattr(*target)

    def signalling(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*target, signalling)
        settings = {"validation": {"checkpoint_every": None}, "checkpoint": {"eval_every": None}}[where]
        result = trained(base, tmp_path / "run", **settings)
    assert not result.finished and result.step < 6
    assert checkpoints_of(tmp_path / "run")[-1] == result.step


def test_average_is_what_is_validated(finished, base, tmp_path):
    """With an average that hardly moves, validation keeps the loss of the first parameters."""
    plain = finished[0].metrics["loss/val"]
    still = trained(plain_steps(base), tmp_path / "still", optimizer__ema=0.999999).metrics["loss/val"]
    assert abs(still - np.log(384)) < 0.1 < np.log(384) - plain


def test_a_full_disk_ends_with_status_1_and_keeps_earlier_checkpoints(base, tmp_path, monkeypatch, capsys, corpus):
    """Writing fails from the third checkpoint on, as on a full disk."""
    words = (
        "train lm_tiny --model.pattern softmax --steps 30 --checkpoint-every 2 --probe-every None --eval-every None --mesh.data 1"
    )
    words += f" --optimizer.warmup-steps 2 --data.source {corpus} --data.val-fraction 0 --keep-last 9 --out {tmp_path}/run"
    original, saves = seal.write_atomically, []

    def failing(path, data):
        saves.append(path)
        if len(saves) >= 3:
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_atomically", failing)
        assert main(words.split()) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and "what was saved before stays" in message and "Traceback" not in message
    assert {2, 4} <= set(checkpoints_of(tmp_path / "run"))
    _, preset, *options = words.split()
    assert train(parse_experiment(preset, [*options, "--resume"])).finished

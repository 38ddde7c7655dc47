"""Runs that train on a task: what they write, how they are evaluated, and that a model learns."""

import contextlib
import json
import shutil
import threading

import jax
import numpy as np
import pytest

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.data.tasks.mqar import MQARTask
from plait.launch import main
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, different_arrays, tiny
from plait.tests.train.pods.pod import SMALL, Pod
from plait.train import run as runs
from plait.train.checkpoint import Checkpoints
from plait.train.loop import train
from plait.train.loss import token_losses, tokens_of
from plait.train.run_folder.lines import read_metrics, series
from plait.train.run_folder.probe_files import ATTENTION
from plait.train.scoring.evaluate import Evaluator, judged_losses
from plait.train.terminal import results

MQAR = MQARTask(vocab_size=40, num_kv_pairs=3, val_rows=10)


def recall(changes=None):
    """`tiny` on MQAR."""
    return changed(
        tiny({"data.task": MQAR, "probe_every": 3, "eval_every": 3, "checkpoint_every": 3, "keep_last": 9}), changes or {}
    )


@pytest.fixture(scope="module")
def finished(compile_cache, tmp_path_factory):
    """A run of six steps on the task."""
    out = tmp_path_factory.mktemp("mqar") / "run"
    return train(recall({"out": str(out)})), out


@pytest.fixture(scope="module")
def text_run(compile_cache, corpus, tmp_path_factory):
    """A run of three steps on text, whose vocabulary holds the task."""
    out = tmp_path_factory.mktemp("text") / "run"
    train(tiny({"data.source": str(corpus), "out": str(out), "steps": 3, "optimizer.warmup_steps": 1}))
    return out


def test_run_validates_with_the_tasks_score(finished):
    result, out = finished
    records = read_metrics(out)
    for name in ("loss/val", "task/mqar/accuracy"):
        steps, values = series(records, name)
        assert steps.tolist() == [3, 6] and np.isfinite(values).all()
    assert 0 <= result.metrics["task/mqar/accuracy"] <= 1 and "loss/bits_per_byte" not in result.metrics
    facts = json.loads((out / "environment.json").read_text())["data"]
    assert facts["task"] == "mqar" and facts["task.num_kv_pairs"] == 3 and facts["vocab_size"] == 40
    assert not (out / "tokenizer").exists() and not (out / "data").exists()


def test_config_of_a_run_comes_back(finished):
    assert codec.load(ExperimentConfig, finished[1] / "config.json").data.task == MQAR


def test_resumed_run_is_one_that_never_stopped(finished, tmp_path):
    _, out = finished
    again = tmp_path / "run"
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "6")
    train(recall({"out": str(again), "resume": True}))
    setup = runs.set_up(recall({"out": str(out)}))
    ends = []
    for folder in (out, again):
        checkpoints = Checkpoints(folder / runs.CHECKPOINTS, read_only=True)
        ends.append(checkpoints.restore(setup.like, 6))
        checkpoints.close()
    (_, state, extra), (_, other, extra_again) = ends
    assert not different_arrays(state, other)
    assert extra["data"] == extra_again["data"] and extra["data"]["step"] == 6


def test_eval_writes_the_score_and_shows_it(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result, out = finished
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((out / "eval_6.json").read_text())
    assert written["step"] == 6 and set(written) == {"step", "mqar", "asked"}
    found = written["mqar"]
    assert_close(np.float32(found["loss"]), result.metrics["loss/val"])
    assert found["accuracy"] == pytest.approx(result.metrics["task/mqar/accuracy"])
    assert found["num_tokens"] == 30 and set(found) == {"loss", "accuracy", "num_tokens", "loss_by_position"}
    assert "30 answers of mqar" in printed and f"{found['accuracy']:.4f}" in printed


def test_results_of_other_options_stay(finished, tmp_path, caplog):
    out = tmp_path / "run"
    shutil.copytree(finished[1], out, ignore=lambda _, names: [name for name in names if name.startswith("eval_")])
    assert main(["eval", str(out)]) == 0
    first = (out / "eval_6.json").read_bytes()
    other = ["eval", str(out), "--tasks", "mqar", "--mqar.num-kv-pairs", "4", "--batches", "1"]
    assert main(other) == 0
    found = json.loads((out / "eval_6_2.json").read_text())
    assert found["mqar"]["num_tokens"] == 16 and found["asked"]["batches"] == 1
    assert found["asked"]["tasks"]["mqar"]["num_kv_pairs"] == 4
    (told,) = [record.message for record in caplog.records if "holds results of other options" in record.message]
    assert told.endswith("eval_6_2.json")
    (out / "eval_6_3.json").write_text("{")  # what cannot be read is kept too
    assert main([*other[:-1], "2"]) == 0
    assert main(["eval", str(out)]) == 0 and main(other) == 0, "the same question has its file"
    assert sorted(path.name for path in out.glob("eval_*")) == [f"eval_6{end}.json" for end in ("", "_2", "_3", "_4")]
    assert (out / "eval_6.json").read_bytes() == first and (out / "eval_6_3.json").read_text() == "{"


@pytest.mark.parametrize("out", [None, "mine.json"])
def test_evaluations_that_end_at_once_keep_all_results(out, tmp_path, monkeypatch):
    usual, gate, write = tmp_path / "eval_6.json", threading.Barrier(4), results.write_json

    def together(path, value, **how):
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(0.5)
        write(path, value, **how)

    monkeypatch.setattr(results, "write_json", together)  # each has looked where it may write before any writes
    named = None if out is None else tmp_path / out
    threads = [threading.Thread(target=results.keep, args=({"step": 6}, {"batches": n}, named, usual)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    kept = [json.loads(path.read_text())["asked"]["batches"] for path in tmp_path.iterdir()]
    assert sorted(kept) == [0, 1, 2, 3]


def test_a_file_that_is_there_is_not_written_over_and_nothing_is_scored(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("mine")
    assert main(["eval", str(tmp_path / "no run"), "--out", str(tmp_path / "mine.json")]) == 2
    assert "mine.json' is there already, and would be lost; give another file" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_text_run_is_evaluated_on_its_text_and_on_a_task(text_run, capsys):
    words = ["eval", str(text_run), "--tasks", "ppl,mqar", "--mqar.vocab-size", "64", "--mqar.val-rows", "6"]
    assert main(words) == 0
    written = json.loads((text_run / "eval_3.json").read_text())
    assert list(written) == ["step", "ppl", "mqar", "asked"] and written["mqar"]["num_tokens"] == 24
    scores = ["loss", "perplexity", "bits_per_byte", "repetition"]
    assert list(written["ppl"]) == [*scores, "num_tokens", "num_bytes", "loss_by_position"]
    assert "repetition" in capsys.readouterr().out


REFUSED = {
    "text where there is none": ("eval {task} --tasks ppl", "--tasks ppl needs a run with a tokenizer, and this one"),
    "more than a row holds": ("eval {task} --tasks mqar --mqar.num-kv-pairs 5", "mqar.num_kv_pairs=5 must be at most a quarter"),
    "more ids than the model has": ("eval {text} --tasks mqar", "--tasks mqar has 8192 ids and the model 384"),
    "options of what is not asked": ("eval {text} --mqar.num-kv-pairs 3", "--mqar.num-kv-pairs is an option of mqar"),
    "a value that cannot be": ("eval {task} --tasks mqar --mqar.power-a 0", "mqar.power_a=0.0 must be a finite number above 0"),
    "an option that is not there": ("eval {task} --tasks mqar --mqar.num-kv-pair 3", "--mqar.num-kv-pairs"),
    "a task that is not there": ("eval {task} --tasks mqra", "did you mean 'mqar'"),
    "text from a task": ("generate {task}", "was trained on data.task=mqar, whose tokens are no text"),
}


@pytest.mark.parametrize(("words", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused(words, hint, finished, text_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    try:
        status = main([word.format(task=finished[1], text=text_run) for word in words.split()])
    except SystemExit as error:
        status = error.code
    printed = "".join(capsys.readouterr())
    assert status == 2 and hint in printed and "Traceback" not in printed, printed


def test_nothing_held_out_cannot_be_evaluated(finished, capsys):
    words = ["eval", str(finished[1]), "--tasks", "mqar", "--mqar.val-rows", "0"]
    assert main(words) == 2
    assert "no held-out rows to evaluate; raise data.task.val_rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("--data.task mqar --data.task.vocab-size 80 --data.task.val-rows 8", marks=pytest.mark.slow),
        "--data.task mlm --model.no-causal",
    ],
)
def test_train_command_ends_with_a_report_and_no_text(words, compile_cache, tmp_path, capsys):
    """Of a task without texts, whose pictures name tokens by their ids, and of a model that generates none."""
    out = tmp_path / "run"
    words += f" --steps 3 --optimizer.warmup-steps 1 --mesh.data 1 --eval-batches 1 --model.pattern softmax --out {out}"
    assert main(["train", "lm_tiny", *words.split()]) == 0
    printed = capsys.readouterr().out
    assert "/accuracy 0." in printed and (out / "report" / "index.html").exists()
    assert "Fellow citizens" not in printed
    if "mqar" in words:
        with np.load(out / ATTENTION) as picture:
            assert all(text.isdigit() for text in picture["tokens"].tolist())


def judged(setup, state, batch):
    """Losses and likeliest tokens of a batch."""

    def judge(params):
        model = setup.blueprint.build(params, state.buffers)
        return judged_losses(model, model.hidden(tokens_of(batch))[0], batch)

    return jax.jit(judge)(state.params)


def test_answers_are_judged_by_the_likeliest_token(compile_cache, tmp_path):
    """With a few positions of logits at a time, on one device and on a mesh that cuts rows, tokens and vocabulary."""
    config = recall({"out": str(tmp_path / "run"), "model.logit_soft_cap": 5.0, "data.batch_size": 8})
    setup = runs.set_up(config)
    state = setup.fresh()
    batch = setup.data.whole()
    logits = np.asarray(jax.jit(lambda p: setup.blueprint.build(p, state.buffers)(tokens_of(batch))[0])(state.params))
    asked = batch.loss_mask > 0
    losses = jax.jit(lambda p: token_losses(setup.blueprint.build(p, state.buffers), batch)[0])(state.params)
    nll, likeliest = judged(setup, state, batch)
    assert_close(nll, losses)
    np.testing.assert_array_equal(likeliest, logits.argmax(-1))
    assert asked.sum() == 24
    whole = Evaluator(setup.blueprint, setup.mesh, setup.data)(state.params, state.buffers, setup.data.val)
    over = runs.set_up(changed(config, {"mesh.data": 2, "mesh.context": 2, "mesh.tensor": 2}))
    params, buffers = jax.device_put((state.params, state.buffers), over.blueprint.shardings(over.mesh))
    cut = Evaluator(over.blueprint, over.mesh, over.data)(params, buffers, over.data.val)
    right = (logits.argmax(-1) == batch.targets) & asked
    alone = Evaluator(setup.blueprint, setup.mesh, setup.data)(state.params, state.buffers, [batch])
    assert alone.scores == {"accuracy": right.sum() / 24}
    assert cut.scores == whole.scores and cut.num_tokens == whole.num_tokens == 30
    assert_close(np.float32(cut.loss), whole.loss)


def test_judging_a_few_positions_at_a_time_is_judging_all(monkeypatch, compile_cache, tmp_path):
    setup = runs.set_up(recall({"out": str(tmp_path / "run")}))
    state, batch = setup.fresh(), setup.data.whole()
    all_at_once = judged(setup, state, batch)
    monkeypatch.setattr("plait.train.scoring.evaluate.LOGITS_AT_ONCE", 3 * 4 * 128)  # three columns, which do not divide sixteen
    some_at_once = judged(setup, state, batch)
    assert_close(some_at_once[0], all_at_once[0])
    np.testing.assert_array_equal(some_at_once[1], all_at_once[1])


@pytest.mark.slow
def test_a_tiny_model_learns_to_recall(tmp_path):
    """Guessing a value of the row is right once in four, guessing any value once in 32; two layers of the delta rule recall nearly all."""
    mixers = {"gated_deltanet": GatedDeltaNetConfig(num_heads=2, head_dim=16)}
    task = MQARTask(vocab_size=64, num_kv_pairs=4, val_rows=256)
    changes = {"model.pattern": "gated_deltanet", "model.mixers": mixers, "model.d_model": 64, "data.task": task}
    changes |= {
        "data.seq_len": 32,
        "data.batch_size": 64,
        "steps": 800,
        "optimizer.warmup_steps": 50,
        "out": str(tmp_path / "run"),
    }
    result = train(tiny({**changes, "optimizer.learning_rate": 5e-3}))
    assert result.metrics["task/mqar/accuracy"] > 0.9, result.metrics


@pytest.mark.slow
def test_two_hosts_train_and_validate_as_one(compile_cache, tmp_path):
    words = (
        *SMALL,
        "--data.task",
        "mqar",
        "--data.task.vocab-size",
        80,
        "--data.task.num-kv-pairs",
        3,
        "--data.task.val-rows",
        20,
    )
    words = (*words, "--steps", 4, "--optimizer.warmup-steps", 1, "--mesh.data", 2)
    for count in (1, 2):
        pod = Pod(count, *words, "--out", tmp_path / f"{count}", cache=compile_cache, devices=2 // count)
        assert all(status == 0 for status, _ in pod.finish()), pod.finish()
    one, two = (dict(pairs(tmp_path / f"{count}")) for count in (1, 2))
    assert one["task/mqar/accuracy"] == two["task/mqar/accuracy"]
    assert_close(np.float32(two["loss/val"]), one["loss/val"])


def pairs(folder):
    """The last of each metric."""
    return [pair for record in read_metrics(folder) for pair in record.items()]

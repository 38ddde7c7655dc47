"""Evaluation at other lengths than that of training, against sums from the logits, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from plait.data.tasks.base import TASKS
from plait.data.tasks.mqar import MQARTask
from plait.data.tasks.needle import NeedleTask
from plait.data.tasks.ppl import PerplexityTask
from plait.data.tasks.reverse import ReverseTask
from plait.launch import main
from plait.models.positions.learned import LearnedConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.common import tiny
from plait.train import run as runs
from plait.train.commands.evaluate import lengths
from plait.train.loop import train
from plait.train.loss import tokens_of
from plait.train.scoring.held_out import OtherText, held_out


@pytest.fixture(scope="module")
def text_run(compile_cache, corpus, tmp_path_factory):
    """A run on text of bytes, in rows of 16."""
    out = tmp_path_factory.mktemp("text") / "run"
    train(tiny({"data.source": str(corpus), "out": str(out), "steps": 3, "optimizer.warmup_steps": 1}))
    return out


@pytest.fixture(scope="module")
def task_run(compile_cache, tmp_path_factory):
    """A run on a task, in rows of 16, with rows of positions for 24."""
    out = tmp_path_factory.mktemp("task") / "run"
    task = ReverseTask(length=8, num_symbols=40, val_rows=6)
    positions = LearnedConfig(max_len=24)
    train(tiny({"data.task": task, "model.positions": positions, "out": str(out), "steps": 3, "optimizer.warmup_steps": 1}))
    return out


def test_each_length_is_a_row_of_the_results(text_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", str(text_run)]) == 0
    own = json.loads((text_run / "eval_3.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(text_run), "--seq-len", "64,16, 256"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((text_run / "eval_3_lengths.json").read_text())
    assert set(written) == {"step", "ppl", "asked"} and [row["seq_len"] for row in written["ppl"]] == [16, 64, 256]
    assert written["ppl"][0] == {"seq_len": 16, **own["ppl"]}, "at the length of training it is what it is without a length"
    sizes = {(row["num_tokens"], row["num_bytes"]) for row in written["ppl"]}
    assert len(sizes) == 1, "each held-out token is predicted once, however rows are cut"
    assert written["ppl"][2]["loss_by_position"][-1]["last"] == 255
    for row in written["ppl"]:
        assert f"{row['bits_per_byte']:.4f}" in printed and f"{row['loss_by_position'][-1]['loss']:.4f}" in printed
    assert json.loads((text_run / "eval_3.json").read_text()) == own


def test_longer_rows_are_scored_by_the_model_as_it_is(text_run, tmp_path):
    trained = runs.opened(text_run)
    data = held_out(trained, PerplexityTask(), OtherText(), tmp_path, 64)
    assert data.config.seq_len == 64 and data.config.batch_size == 1, "as many tokens as four rows of 16"
    model = trained.program.blueprint.build(trained.params, trained.buffers)
    nats = []
    for batch in data.val:
        logits = np.asarray(jax.jit(lambda b: model(tokens_of(b))[0])(batch), np.float64)
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        nats.append(losses[batch.loss_mask > 0])
    assert main(["eval", str(text_run), "--seq-len", "64", "--out", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["ppl"]
    assert_close(np.float32(row["loss"]), np.concatenate(nats).mean())


def test_a_task_is_asked_at_several_lengths(task_run, text_run, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert (
        main(["eval", str(task_run), "--seq-len", "16,24", "--reverse.length", "5", "--tasks", "reverse", "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text())["reverse"]
    assert [(row["seq_len"], row["num_tokens"]) for row in found] == [(16, 30), (24, 30)]
    out = tmp_path / "others.json"
    words = ["--tasks", "needle,ppl", "--seq-len", "300,320", "--needle.val-rows", "3", "--batches", "2", "--out", str(out)]
    assert main(["eval", str(text_run), *words]) == 0
    found = json.loads(out.read_text())
    assert [row["num_tokens"] for row in found["needle"]] == [10, 10] and len(found["ppl"]) == 2
    assert "found at" in capsys.readouterr().out


REFUSED = {
    "more than the learned positions": (
        "eval {task} --seq-len 16,32",
        "--seq-len 32 must be at most the 24 tokens of the run's model.positions, which knows no place beyond; use 24 or less",
    ),
    "less than the task needs": (
        "eval {task} --seq-len 8",
        "reverse.length=8 needs rows of at least 16 tokens, not data.seq_len=8",
    ),
    "no length": ("eval {task} --seq-len 16,long", "--seq-len '16,long' has 'long', and a length must be a whole number from 1"),
    "nothing": ("eval {task} --seq-len ,", "--seq-len ',' must name lengths of rows"),
    "more than any row": ("eval {task} --seq-len 99999999", "'99999999', and a length must be a whole number from 1 to 16777216"),
    "another vocabulary": (
        "eval {task} --tasks reverse --reverse.num-symbols 50",
        "--tasks reverse has 51 ids with these options and had 41 in the run's training",
    ),
}


@pytest.mark.parametrize(("words", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused(words, hint, task_run, text_run, capsys):
    before = sorted(task_run.iterdir())
    assert main([word.format(task=task_run, text=text_run) for word in words.split()]) == 2
    printed = capsys.readouterr().err
    assert hint in printed and "Traceback" not in printed, printed
    assert sorted(task_run.iterdir()) == before


def test_needles_of_bytes_are_for_runs_on_bytes(text_run, task_run, tmp_path):
    """Other ids than bytes stand for something else, also where the vocabulary has room for bytes."""
    ask = lambda trained: held_out(trained, NeedleTask(val_rows=2), OtherText(), tmp_path, 300)
    trained = runs.opened(text_run)
    assert ask(trained).num_val_rows == 2
    with pytest.raises(
        ValueError, match=r"--tasks needle asks in bytes, and the ids of this run are those of data\.tokenizer=byte"
    ):
        ask(dataclasses.replace(trained, tokenizer=object()))
    config = trained.program.config
    for task, of in ((NeedleTask(val_rows=1), None), (MQARTask(vocab_size=256, num_kv_pairs=2), r"data\.task=mqar")):
        data = dataclasses.replace(config.data, task=task, seq_len=300 if of is None else 16)
        other = dataclasses.replace(
            trained, tokenizer=None, program=dataclasses.replace(trained.program, config=dataclasses.replace(config, data=data))
        )
        if of is None:
            assert ask(other).num_val_rows == 2
        else:
            with pytest.raises(ValueError, match=f"--tasks needle asks in bytes, and the ids of this run are those of {of}"):
                ask(other)
    of_bytes = [name for name, task in TASKS.all().items() if task.reads_bytes]
    assert of_bytes == ["common_words", "frequent_words", "needle", "needles", "variable_tracking"]


def test_lengths_are_read_once_each_and_ascending():
    assert lengths(" 64,16,64") == (16, 64)

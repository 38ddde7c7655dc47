"""Validation numbers against sums worked out from the logits."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.tasks.base import TASKS
from plait.data.tasks.ppl import PerplexityTask
from plait.launch import main
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, tiny, write_corpus
from plait.train import run as runs
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.commands.evaluate import task_names
from plait.train.loop import train
from plait.train.loss import tokens_of
from plait.train.scoring.evaluate import Evaluation, Evaluator, in_context, repeats
from plait.train.scoring.held_out import OtherText, held_out, is_own


@pytest.fixture(scope="module")
def scored(compile_cache, corpus, tmp_path_factory):
    """Fresh parameters (made large, so that losses differ), the held-out batches, and their evaluation."""
    config = tiny({"data.source": str(corpus), "data.tokenizer": "bpe", "data.vocab_size": 270, "model.logit_soft_cap": 20.0})
    setup = runs.set_up(changed(config, {"out": str(tmp_path_factory.mktemp("eval") / "run")}))
    state = setup.fresh()
    params = {name: p * 5 if name.endswith("head.kernel") else p for name, p in state.params.items()}
    evaluator = Evaluator(setup.blueprint, setup.mesh, setup.data)
    return setup, params, state.buffers, evaluator, evaluator(params, state.buffers, setup.data.val)


@pytest.fixture(scope="module")
def by_hand(scored):
    """Nats, bytes and position of every held-out token, from the logits in float64."""
    setup, params, buffers, _, _ = scored
    model = setup.blueprint.build(params, buffers)
    nats, sizes, positions = [], [], []
    for batch in setup.data.val:
        logits, _ = jax.jit(lambda b: model(tokens_of(b)))(batch)
        logits = np.asarray(logits, np.float64)
        normalizer = np.log(np.exp(logits).sum(-1))
        loss = normalizer - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
        real = batch.loss_mask > 0
        nats.append(loss[real])
        sizes.append(setup.data.tokenizer.bytes_per_token[batch.targets][real])
        positions.append(batch.positions[real])
    return np.concatenate(nats), np.concatenate(sizes), np.concatenate(positions)


def test_memory_is_linear_in_the_length(scored):
    setup, params, buffers, evaluator, _ = scored
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    one = jax.tree.map(lambda x: x[:1], next(iter(setup.data.val)))

    def temporaries(length: int) -> int:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, length), x.dtype), one)
        sizes = jax.ShapeDtypeStruct((setup.blueprint.config.model.vocab_size,), np.int32)
        return (
            evaluator._score.lower(shapes(params), shapes(buffers), batch, sizes).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporaries(8192) < 1.2 * 4 * temporaries(2048)


def test_loss_is_the_mean_over_all_held_out_tokens(scored, by_hand):
    setup, _, _, _, found = scored
    nats, sizes, _ = by_hand
    assert found.num_tokens == len(nats) == setup.data.facts["num_val_tokens"]
    assert found.num_bytes == sizes.sum() == setup.data.facts["num_val_bytes"]
    assert_close(np.float32(found.loss), nats.mean())
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_bits_per_byte_is_loss_times_tokens_over_bytes(scored):
    found = scored[-1]
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * found.num_tokens / found.num_bytes, rel=1e-12)
    by_position = {f"position/{first}": loss for first, _, loss in found.by_position()}
    of_text = {"loss/bits_per_byte": found.bits_per_byte, "predictions/repetition": found.repetition}
    assert found.metrics() == {"loss/val": found.loss, **of_text, **by_position}


def test_positions_sum_to_the_whole_and_cover_doubling_ranges(scored, by_hand):
    found = scored[-1]
    nats, _, positions = by_hand
    assert found.tokens_by_position.sum() == found.num_tokens
    assert found.nats_by_position.sum() == pytest.approx(found.nats)
    rows = found.by_position()
    assert [(first, last) for first, last, _ in rows] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    for first, last, loss in rows:
        assert_close(np.float32(loss), nats[(positions >= first) & (positions <= last)].mean(), err_msg=f"{first} to {last}")


def test_in_context_score_is_of_documents_that_are_long_enough():
    """Two documents reach position 500; one of them is not asked at position 50, as a prompt is not."""
    length = 1200
    segment_ids, positions = np.zeros((2, length), np.int32), np.zeros((2, length), np.int32)
    for row, start, size in ((0, 0, 300), (0, 300, 900), (1, 0, 501), (1, 501, 500)):
        segment_ids[row, start : start + size] = start + 1
        positions[row, start : start + size] = np.arange(size)
    nll = np.random.default_rng(0).random((2, length)).astype(np.float32)
    mask = (segment_ids > 0).astype(np.float32)
    batch = Batch(segment_ids, segment_ids, segment_ids, positions, mask)
    differences = [nll[0, 800] - nll[0, 350], nll[1, 500] - nll[1, 50]]
    total, count = in_context(nll, batch)
    assert count == 2
    assert_close(np.float32(total), np.float32(sum(differences)))
    mask[1, 50] = 0
    total, count = in_context(nll, batch)
    assert count == 1
    assert_close(np.float32(total), np.float32(differences[0]))
    assert in_context(nll[:, :400], jax.tree.map(lambda a: a[:, :400], batch))[1] == 0


def test_in_context_score_is_a_metric_where_there_is_one(scored):
    assert scored[-1].in_context is None and "in_context" not in scored[-1].to_json()
    found = dataclasses.replace(scored[-1], in_context=-0.5)
    assert found.metrics()["loss/in_context"] == found.to_json()["in_context"] == -0.5


def test_repetition_is_of_predictions_that_follow_each_other():
    """Not across documents, and not of what is given."""
    likeliest = np.array([[3, 3, 3, 5, 5, 7, 7, 7], [1, 1, 1, 1, 2, 2, 9, 9]])
    segments = np.array([[1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]])
    mask = (segments > 0).astype(np.float32)
    mask[1, 0] = 0
    batch = Batch(segments, segments, segments, segments, mask)
    same, count = repeats(likeliest, batch)
    assert (same, count) == (1 + 1 + 2 + 2 + 1, 6 + 4)


@pytest.mark.parametrize("columns", [64, 5])
def test_repetition_is_that_of_the_likeliest_tokens(columns, scored, monkeypatch):
    setup, params, buffers, _, whole = scored
    monkeypatch.setattr("plait.train.scoring.evaluate.JUDGED", columns)
    found = Evaluator(setup.blueprint, setup.mesh, setup.data)(params, buffers, setup.data.val) if columns == 5 else whole
    model, pairs = setup.blueprint.build(params, buffers), []
    for batch in setup.data.val:
        likeliest = np.asarray(jax.jit(lambda b: model(tokens_of(b)))(batch)[0]).argmax(-1)
        for row, segments in zip(likeliest[:, -columns:], batch.segment_ids[:, -columns:], strict=True):
            pairs += [row[i] == row[i + 1] for i in range(len(row) - 1) if segments[i] == segments[i + 1] > 0]
    assert found.repetition == pytest.approx(np.mean(pairs)) and 0 < found.repetition < 1
    assert found.metrics()["predictions/repetition"] == found.to_json()["repetition"] == found.repetition


def test_limit_takes_the_first_batches(scored):
    setup, params, buffers, evaluator, whole = scored
    one = evaluator(params, buffers, setup.data.val, 1)
    alone = evaluator(params, buffers, [setup.data.val[0]])
    assert one.nats == alone.nats and one.num_tokens < whole.num_tokens
    assert evaluator(params, buffers, setup.data.val, 10**6).nats == whole.nats


def test_rows_of_padding_count_for_nothing(scored):
    setup, params, buffers, evaluator, _ = scored
    batch = setup.data.val[0]
    padding = type(batch)(*(np.zeros_like(a) for a in batch))
    one, two = (evaluator(params, buffers, b) for b in ([batch], [batch, padding]))
    assert (one.nats, one.num_tokens, one.num_bytes) == (two.nats, two.num_tokens, two.num_bytes)
    with pytest.raises(ValueError, match="no held-out text"):
        evaluator(params, buffers, [padding])


def test_perplexity_of_a_diverged_model_is_infinite():
    nothing = np.zeros(4)
    found = Evaluation(task="ppl", nats=1e6, num_tokens=10, num_bytes=10, nats_by_position=nothing, tokens_by_position=nothing)
    assert found.perplexity == math.inf and found.by_position() == []


EVERY_TASK = ", ".join(TASKS.all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"must name tasks among {EVERY_TASK}"),
        (",", f"must name tasks among {EVERY_TASK}"),
        ("pppl", "--tasks 'pppl': task 'pppl' is not registered; did you mean 'ppl'"),
        ("ppl,nothing", f"task 'nothing' is not registered; there are {EVERY_TASK}"),
    ],
)
def test_unknown_tasks_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        task_names(text)


def test_eval_command_writes_what_training_measured(compile_cache, corpus, tmp_path, capsys, monkeypatch):
    """On the run's held-out text, with the averaged parameters, on another number of devices."""
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    result = train(tiny({"data.source": str(corpus), "out": str(out), "optimizer.ema": 0.5}))
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((out / "eval_6.json").read_text())
    assert written["step"] == 6
    assert_close(np.float32(written["ppl"]["loss"]), result.metrics["loss/val"])
    assert_close(np.float32(written["ppl"]["bits_per_byte"]), result.metrics["loss/bits_per_byte"])
    assert f"{written['ppl']['bits_per_byte']:.4f}" in printed and f"{written['ppl']['num_tokens']:,} held-out tokens" in printed
    weights = [(row["last"] - row["first"] + 1, row["loss"]) for row in written["ppl"]["loss_by_position"]]
    assert sum(width for width, _ in weights) == 16
    assert main(["eval", str(out), "--step", "5"]) == 2
    assert "no checkpoint of step 5; it has 6" in capsys.readouterr().err
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert main(["eval", str(out), "--batches", "1"]) == 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before


@pytest.fixture(scope="module")
def run_of_text(compile_cache, tmp_path_factory):
    """A run, and the folder of its corpus."""
    folder = tmp_path_factory.mktemp("readers")
    text = write_corpus(folder / "text")
    train(tiny({"data.source": str(text), "data.tokenizer": "bpe", "data.vocab_size": 270, "out": str(folder / "run")}))
    return folder / "run", text


@pytest.fixture
def copied(run_of_text, tmp_path):
    """The same, to be spoiled: the run, and the corpus at the place that its config names."""
    run, text = run_of_text
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(text, tmp_path / "kept")
    yield tmp_path / "run", text
    shutil.rmtree(text)
    shutil.copytree(tmp_path / "kept", text, copy_function=shutil.copy2)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_changed_corpus_is_refused_and_scored_on_purpose_under_its_name(copied, capsys):
    run, text = copied
    before = files_of(run)
    for file in text.iterdir():
        file.write_text("quite another text came later " * 30)
    assert main(["eval", str(run)]) == 2
    message = capsys.readouterr().err
    assert "was trained on other text than data.source=" in message and "corpus was '" in message
    assert f"--data.source {text}" in message
    assert main(["generate", str(run), "--num-tokens", "3"]) == 0, "needs no corpus"
    assert files_of(run) == before, "readers write nothing"
    capsys.readouterr()
    assert main(["eval", str(run), "--data.source", str(text)]) == 0
    assert f" on {text}: " in capsys.readouterr().out
    (new,) = files_of(run).keys() - before.keys()
    assert new == "eval_6_text.json"
    written = json.loads((run / new).read_text())
    assert written["source"] == str(text) and written["ppl"]["num_bytes"] == sum(file.stat().st_size for file in text.iterdir())


def test_same_text_elsewhere_is_the_run_s_own(copied, tmp_path, capsys):
    run, text = copied
    moved = tmp_path / "moved"
    shutil.copytree(text, moved)
    shutil.rmtree(text)
    assert main(["eval", str(run)]) == 2
    assert "nor an existing path" in capsys.readouterr().err
    assert main(["generate", str(run), "--num-tokens", "3"]) == 0
    before = files_of(run)
    assert main(["eval", str(run), "--data.source", str(moved), "--out", str(tmp_path / "found.json")]) == 0
    assert files_of(run) == before
    found = json.loads((tmp_path / "found.json").read_text())
    assert (
        set(found) == {"step", "ppl", "asked"}
        and found["ppl"]["num_bytes"] < sum(file.stat().st_size for file in moved.iterdir()) / 4
    )
    text.mkdir()


def test_a_model_that_brings_no_text_of_its_own_is_scored_on_all_of_another(copied, tmp_path):
    run, text = copied
    imported = dataclasses.replace(runs.opened(run), data={})
    other = tmp_path / "other.txt"
    other.write_text("all of this is scored\n" * 40)
    data = held_out(imported, PerplexityTask(), OtherText(source=str(other)), tmp_path)
    assert data.facts["num_train_bytes"] == 0 and not is_own(imported, data)
    own = held_out(imported, PerplexityTask(), OtherText(source=str(text)), tmp_path)
    assert own.facts["num_train_bytes"] > 0 and is_own(imported, own)


def test_another_tokenizer_is_refused(copied, capsys):
    run, _ = copied
    before = (run / "tokenizer" / "tokenizer.json").read_text()
    for name in ("tokenizer.json", "tokenizer_meta.json"):
        (run / "tokenizer" / name).unlink()
    assert main(["generate", str(run)]) == 2 and "has no tokenizer/tokenizer.json" in capsys.readouterr().err
    (run / "tokenizer" / "tokenizer.json").write_text(before.replace('"add_prefix_space":false', '"add_prefix_space":true'))
    for command in ("eval", "generate"):
        assert main([command, str(run)]) == 2
        assert "has another tokenizer/ than it was trained with; put that one back" in capsys.readouterr().err


def test_run_that_cannot_be_written_is_evaluated_with_a_warning(copied, tmp_path, capsys, caplog):
    run, _ = copied
    (run / "eval_6.json").mkdir()  # whoever runs this, it is no file that can be written
    assert main(["eval", str(run)]) == 0
    assert "held-out tokens" in capsys.readouterr().out
    (warning,) = [record.message for record in caplog.records if "eval_6.json cannot be written" in record.message]
    assert "--out FILE keeps them" in warning
    assert main(["eval", str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err


def test_checkpoint_that_training_replaces_while_it_is_read(copied, monkeypatch):
    run, _ = copied
    restore = Checkpoints.restore

    def replaced(self, like, step=None):
        monkeypatch.setattr(Checkpoints, "restore", restore)
        (run / "checkpoints" / "6").rename(run / "checkpoints" / "7")
        raise CheckpointError("cannot be read")

    monkeypatch.setattr(Checkpoints, "restore", replaced)
    assert runs.opened(run).step == 7

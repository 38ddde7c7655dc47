"""Softmax attention to other mixers: what they inherit, what attention transfer trains, and that it brings them nearer."""

import json

import numpy as np
import pytest

from plait.launch import main
from plait.models.mixers.transfer import LOSS
from plait.tests.tolerances import assert_close
from plait.tests.train.common import different_arrays
from plait.tests.train.convert.reshapes import layer, logits, make_run, model_of, reshaped
from plait.train.convert.reshapes.linearize import Linearize
from plait.train.convert.reshapes.students import Students
from plait.train.convert.students import STUDENTS
from plait.train.convert.weights import ConvertError
from plait.train.loop import train
from plait.train.origin import parse_run
from plait.train.run import opened
from plait.train.run_folder.lines import read_metrics, series

HEADS, WIDTH = 6, 4
USUAL = ("lolcats", "mamba2")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A run of softmax attention with fewer key heads and biases, not to be written to."""
    return make_run(tmp_path_factory.mktemp("grouped") / "run", model_of(num_kv_heads=2, qkv_bias=True))


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in STUDENTS])
def test_students_begin_as_their_teacher(name, grouped):
    _, new = reshaped(grouped, Linearize(pattern=f"{name},softmax,{name}", teach=False), f"copied_{name}")
    old = opened(grouped)
    assert [mixer.name for mixer in new.program.config.model.layer_mixers] == [name, "softmax", name]
    before, after = layer(old, 2), layer(new, 2)
    assert {key: value.tolist() for key, value in layer(old, 1).items()} == {key: v.tolist() for key, v in layer(new, 1).items()}
    names = STUDENTS[name].inherits or {part: part for part in "qkvo"}
    for ours, theirs in names.items():
        kernel = before[f"mixer.{theirs}.kernel"]
        if theirs in "kv" and name != "lolcats":  # lolcats shares keys between heads itself
            kernel = np.concatenate([kernel.reshape(20, 2, WIDTH)[:, head // 3] for head in range(HEADS)], axis=1)
        np.testing.assert_array_equal(after[f"mixer.{ours}.kernel"], kernel)
    for part in ("channel_mixer.up.kernel", "mixer_norm.scale"):
        np.testing.assert_array_equal(after[part], before[part])


def test_a_teacher_gives_what_it_gave(grouped):
    found, new = reshaped(grouped, Linearize(pattern="lolcats*2,softmax"), "taught")
    assert (found.moved.mean_kl, found.moved.largest) == (0, 0)
    assert_close(logits(new), logits(opened(grouped)))
    trained = {path.rpartition("mixer.student.")[2] for path in new.params}
    assert trained == {"q_map.w.kernel", "k_map.w.kernel", "window_factor"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_transfer_brings_students_nearer(name, grouped, corpus, compile_cache, tmp_path):
    pattern, text = f"{name},softmax*2", next(path for path in corpus.rglob("*") if path.is_file())
    copied, _ = reshaped(grouped, Linearize(window_size=4, pattern=pattern, teach=False), f"only_copied_{name}", text=text)
    _, taught = reshaped(grouped, Linearize(window_size=4, pattern=pattern), f"to_be_taught_{name}")
    words = ["--init-from", str(grouped.with_name(f"to_be_taught_{name}")), "--data.source", str(corpus), "--steps", "300"]
    train(parse_run([*words, "--optimizer.learning-rate", "3e-2", "--out", str(tmp_path / "run")]))
    after = opened(tmp_path / "run")
    assert different_arrays(after.buffers, taught.buffers) == []
    losses = series(read_metrics(tmp_path / "run"), f"loss/{LOSS}")[1]
    assert losses[-1] < 0.9 * losses[0]
    found, _ = reshaped(tmp_path / "run", Students(), "done", text=text)
    assert found.moved.mean_kl < copied.moved.mean_kl


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("softmax", "changes no layer"),
        ("lolcats,retnet,softmax", "gives layer 1 'retnet'; it must be 'softmax', which is there, or one of lolcats"),
    ],
)
def test_patterns_that_cannot_be(pattern, message, grouped, tmp_path):
    with pytest.raises(ConvertError, match=message):
        reshaped(grouped, Linearize(window_size=4, pattern=pattern), "refused")
    assert not grouped.with_name("refused").exists()


def test_one_line_copies_teaches_and_tunes_and_goes_on(grouped, corpus, compile_cache, tmp_path, capsys):
    words = ["convert", "linearize", str(grouped), str(tmp_path / "all"), "--pattern", "lolcats,softmax*2", "--window-size", "4"]
    words += ["--data.source", str(corpus), "--transfer.steps", "40", "--transfer.optimizer.learning-rate", "3e-2"]
    assert main([*words[:4], "--pattern", "retnet,softmax*2"]) != 0 and not (tmp_path / "all").exists()
    assert main([*words, "--data.batch-size", "3"]) != 0  # training is refused, and the right words can follow
    words += ["--tune.steps", "10", "--tune.model.lora.rank", "2", "--data.batch-size", "16"]
    assert main(words) == 0
    found = json.loads((tmp_path / "all" / "linearize.json").read_text())
    losses = found["losses"]
    assert losses["hybrid"] < losses["copied"] and losses["tuned"] < losses["hybrid"]
    closed = (losses["copied"] - losses["tuned"]) / (losses["copied"] - losses["teacher"])
    assert found["gap_closed"] == pytest.approx(closed)
    assert found["tokens"] == {"transfer": 40 * 16 * 16, "tuned": 10 * 16 * 16}
    assert found["trained"]["transfer"] == HEADS * (2 * WIDTH * WIDTH + 1)
    both, alone = ((tmp_path / "all" / where / "index.html").read_text() for where in ("report", "transfer/report"))
    assert "Attention transfer" in both and "One line for each layer" in alone

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("*/checkpoints/*")}
    capsys.readouterr()
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("*/checkpoints/*")} == made
    assert f"{found['gap_closed']:.1%} of what copying loses" in capsys.readouterr().out
    assert main([*words, "--window-size", "8"]) != 0
    assert "was begun with other options (how" in capsys.readouterr().err

"""Softmax attention to other mixers: what they inherit, what attention transfer trains, and that it brings them nearer."""

import dataclasses
import json

import numpy as np
import pytest

from plait.launch import main
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.transfer import LOSS
from plait.models.positions.alibi import ALiBiConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.common import different_arrays
from plait.tests.train.convert.reshapes import layer, logits, make_run, model_of, reshaped
from plait.train.convert.linearize.head_parts import head_parts
from plait.train.convert.linearize.students import STUDENTS
from plait.train.convert.reshapes.linearize import Linearize
from plait.train.convert.reshapes.students import Students
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
@pytest.mark.parametrize(("name", "heads"), [*((name, None) for name in STUDENTS), ("lolcats", "0.0,0.1,0.2")])
def test_transfer_brings_students_nearer(name, heads, grouped, corpus, compile_cache, tmp_path):
    text = next(path for path in corpus.rglob("*") if path.is_file())
    how = Linearize(window_size=4, pattern=f"{name},softmax*2", heads=heads)
    own = f"{name}_{heads}"
    copied, _ = reshaped(grouped, dataclasses.replace(how, teach=False), f"only_copied_{own}", text=text)
    _, taught = reshaped(grouped, how, f"to_be_taught_{own}")
    words = ["--init-from", str(grouped.with_name(f"to_be_taught_{own}")), "--data.source", str(corpus), "--steps", "300"]
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    """Groups of two heads, and parameters of them that are no projections."""
    options = {"num_kv_heads": 3, "qkv_bias": True, "o_bias": True, "qk_norm": True}
    return make_run(tmp_path_factory.mktemp("parted") / "run", model_of(**options))


def test_heads_stay_beside_a_student_of_the_others(parted):
    found, taught = reshaped(parted, Linearize(pattern="lolcats*2,softmax", heads="0.2,0.3, 1.4,1.5,1.0,1.1"), "beside")
    assert found.moved.largest < 1e-4
    assert_close(logits(taught), logits(opened(parted)))
    assert {path.rpartition("mixer.parts.1.student.")[2] for path in taught.params} == {
        "q_map.w.kernel",
        "k_map.w.kernel",
        "window_factor",
    }
    _, hybrid = reshaped(parted.with_name("beside"), Students(), "in_place")
    before, after = layer(opened(parted), 0), layer(hybrid, 0)
    kept, others = [2, 3], [0, 1, 4, 5]
    wide = lambda x: x.T if len(x) != 20 else x
    by_head = lambda name, heads: wide(before[name]).reshape(20, -1, WIDTH)[:, heads].reshape(20, -1)
    for part, heads, kv_heads in ((0, kept, [1]), (1, others, [0, 2])):
        own = f"mixer.parts.{part}."
        np.testing.assert_array_equal(after[f"{own}q.kernel"], by_head("mixer.q.kernel", heads))
        np.testing.assert_array_equal(after[f"{own}v.kernel"], by_head("mixer.v.kernel", kv_heads))
        np.testing.assert_array_equal(after[f"{own}o.kernel"].T, by_head("mixer.o.kernel", heads))
        np.testing.assert_array_equal(after[f"{own}k_norm.scale"], before["mixer.k_norm.scale"])
    assert [key for key in after if key.endswith("o.bias")] == ["mixer.parts.0.o.bias"]
    student = layer(taught, 0)["mixer.parts.1.student.q_map.w.kernel"]
    np.testing.assert_array_equal(after["mixer.parts.1.q_map.w.kernel"], student)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("0.2,0.3,1.0", "layer 1 shares the keys of head 0 between its heads 0, 1; name all of them, or none"),
        ("2.0,2.1", "names heads of layer 2, which pattern='lolcats..,softmax' leaves 'softmax'; leave them out"),
        (",".join(f"0.{head}" for head in range(6)), "layer 0 has no other heads than these 6; let it keep its name"),
        ("0.9", "0.9 is head 9, and layer 0 .softmax. has the heads 0 to 5"),
    ],
)
def test_heads_that_cannot_stay(heads, message, parted):
    with pytest.raises(ValueError, match=message):
        reshaped(parted, Linearize(pattern="lolcats*2,softmax", heads=heads), "refused")
    assert not parted.with_name("refused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True, "qk_norm_over": "width"}, "has qk_norm_over='width', a norm over all heads"),
        ({"positions": ALiBiConfig()}, "has positions 'alibi', which are not the same for all heads"),
        ({"shared_kv": "write"}, "shares kv with other layers"),
    ],
)
def test_attention_that_is_more_than_its_heads(options, message):
    with pytest.raises(ValueError, match=message):
        head_parts(SoftmaxConfig(num_heads=6, head_dim=4, **options), 20, [0])

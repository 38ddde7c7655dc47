"""`launch.py inspect`: losses and statistics of the text's rows, the page and its numbers, and what cannot be inspected."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.launch import main
from plait.models.mixers.linear.base_conv import BaseConvConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import LENGTH, logits, make_run, model_of
from plait.train.inspection import inspecting
from plait.train.inspection.inspecting import rows_of_text
from plait.train.report.panels import attention
from plait.train.report.run import Attention
from plait.train.report.style import Picture
from plait.train.run import opened

NEEDLE = ["--needle.prompts", "2", "--needle.cue", "2", "--needle.answer", "2", "--needle.length", "24"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("inspected") / "run", model_of())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The state of the union, and <the> state of the text. " * 2, "utf-8")
    return path


@pytest.fixture(scope="module")
def inspected(run, text):
    """Two rows with probes of looks, gradients and all layers, and the model without two heads. While it is made another takes its folder."""
    out, check = run.parent / "out", inspecting._check_new

    def check_and_lose(folder):
        check(folder)
        (folder / "inspection.json").mkdir(parents=True)

    options = ["--rows", "2", "--probe.only", "entropy,head_importance,rollout", "--heads", "1.2", "--mask-heads", "1.2,2.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspecting, "_check_new", check_and_lose)
        assert main(["inspect", str(run), "--text", str(text), "--out", str(out), *options, *NEEDLE]) == 0
    assert [path.name for path in out.iterdir()] == ["inspection.json"], "what is there stays"
    out = out.with_name("out-2")
    return out, json.loads((out / "inspection.json").read_text())


def rows(text):
    ids = np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)
    targets = ids[: 2 * LENGTH].reshape(2, LENGTH)
    return np.concatenate([np.full((2, 1), ByteTokenizer().bos_id, np.int32), targets[:, :-1]], axis=1), targets


def losses(of, ids, targets):
    z = np.float64(of)
    z = z - z.max(-1, keepdims=True)
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]


def test_losses_are_those_of_the_rows(run, text, inspected):
    _, found = inspected
    ids, targets = rows(text)
    expected = losses(logits(opened(run), ids), ids, targets)
    whole, masked = found["models"]
    assert_close(np.float32(whole["loss"]), np.float32(expected.mean()))
    assert (found["read"], found["tokens"], found["length"]) == (2 * LENGTH, text.stat().st_size, LENGTH)
    told = whole["token_by_token"]
    assert told["loss"][0] is None, "nothing predicts the start token"
    assert_close(np.float32(told["loss"][1:]), np.float32(expected[0, :-1]))
    assert masked["masked"] == ["1.2", "2.5"] and abs(masked["loss"] - whole["loss"]) > 1e-3


def test_attention_of_the_named_head_is_there_token_by_token(inspected):
    _, found = inspected
    for one in found["models"]:
        told = one["token_by_token"]
        (attention,) = told["attention"].values()
        rows = np.asarray(attention)
        assert list(told["attention"]) == ["1.2"] and rows.shape == (LENGTH, LENGTH)
        assert_close(np.float32(rows.sum(1)), np.ones(LENGTH, np.float32))
        assert np.shape(told["largest"]) == (3, LENGTH) and np.shape(told["received"]) == (3, LENGTH)
        for name in ("rollout", "flow"):
            assert_close(np.float32(np.sum(told[name])), np.float32(1))


def test_statistics_of_looks_and_of_gradients_are_there_for_each_model(inspected):
    _, found = inspected
    whole, masked = ({name: np.array(v, np.float64) for name, v in one["statistics"].items()} for one in found["models"])
    assert set(whole) == {"entropy", "entropy_ratio", "head_importance", "retrieval"}, "rows are too short for a rollout"
    assert_close(np.float32((whole["head_importance"] ** 2).sum(1)), np.ones(3, np.float32))
    assert masked["head_importance"][1, 2] == masked["head_importance"][2, 5] == 0, "what gives nothing changes nothing"
    assert_close(np.float32(masked["entropy"][:2]), np.float32(whole["entropy"][:2]))  # what comes before a head does not feel it


def test_the_page_has_figures_and_both_models(inspected):
    out, _ = inspected
    page = (out / "index.html").read_text()
    for what in ("plait inspection", "all heads", "without 1.2,2.5", "needle tokens recalled", "Token by token"):
        assert what in page
    assert "extreme ones of each mixer" not in page, "the named head is pictured"
    names = {path.stem for path in out.glob("*.png")}
    assert {"received", "sizes", "made_of", "attention", "attention_1", "final", "attention-over-training"} <= names


def test_named_heads_are_pictured_in_place_of_the_telling_ones(monkeypatch):
    monkeypatch.setattr(attention, "choose_heads", None)  # nobody chooses
    maps = np.tile(np.tri(4) / np.arange(1, 5)[:, None], (2, 2, 1, 1))
    maps[1, 1] = np.nan
    run = SimpleNamespace(name="a", attention=Attention(maps, list("text"), 0), layers=[{"mixer": "softmax", "kind": "full"}] * 2)
    assert isinstance(attention.pictures(0, run, [(1, 0), (1, 1)]), Picture)
    assert "hold no finite head" in attention.pictures(0, run, [(1, 1)])


def test_layers_of_other_kinds_show_what_they_have_and_random_heads_are_left_out(tmp_path, text):
    mixers = {"gla": GLAConfig(num_heads=2, expand_k=0.6, expand_v=0.6), "base_conv": BaseConvConfig(), **model_of().mixers}
    run = make_run(tmp_path / "run", model_of(pattern="gla,softmax,base_conv", mixers=mixers))
    options = ["--rows", "1", "--probe.only", "sinks", "--mask-heads", "random", "--mask-count", "3"]
    assert main(["inspect", str(run), "--text", str(text), *options, *NEEDLE]) == 0
    found = json.loads((run / "inspect_0" / "inspection.json").read_text())
    whole, masked = found["models"]
    layers = [int(head.partition(".")[0]) for head in masked["masked"]]
    assert len(set(masked["masked"])) == 3 and set(layers) <= {0, 1}, "a convolution has no heads to be left out"
    received = whole["token_by_token"]["received"]
    assert None not in received[0][:-1] + received[1][:-1] and set(received[2]) == {None}
    assert (run / "inspect_0" / "index.html").is_file()


def test_rows_of_a_text():
    ids = np.arange(10, 21)
    with_start = rows_of_text(ids, 3, 5, 1, 2)
    assert with_start.tokens.tolist() == [[1, 10, 11, 12, 13], [1, 15, 16, 17, 18], [1, 20, 0, 0, 0]]
    assert with_start.targets.tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 2, 0, 0, 0]]
    assert with_start.loss_mask.sum(1).tolist() == [5, 5, 2] and with_start.positions[2].tolist() == [0, 1, 0, 0, 0]
    without = rows_of_text(ids, 2, 5, None, 2)
    assert without.tokens.tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert without.targets.tolist() == [[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]]
    end = rows_of_text(ids, 4, 5, None, 2)
    assert end.tokens[2].tolist() == [20, 0, 0, 0, 0] and end.targets[2, 0] == 2 and not end.segment_ids[3].any()


def published(run, text):
    folder = run.parent / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return [str(folder)]


BAD = {
    "a published model": (published, "is a published model and no run folder; make one of it first: launch.py convert import"),
    "no run": (lambda run, text: [str(run.parent / "none")], "is not a run folder"),
    "a step that is not there": (lambda run, text: [str(run), "--step", "7"], "7"),
    "another step than the checkpoint's": (
        lambda run, text: [str(run / "checkpoints" / "0"), "--step", "7"],
        "step=7 is another",
    ),
    "no such text": (lambda run, text: [str(run), "--text", str(run / "none.txt")], "cannot be read"),
    "a folder that is there": (lambda run, text: [str(run), "--out", str(run)], "is there already; give another --out"),
    "a folder in a file": (lambda run, text: [str(run), "--out", str(text / "out")], "text.txt' is a file; give another --out"),
    "a set of heads beside heads": (
        lambda run, text: [str(run), "--mask-heads", "retrieval,1.0"],
        "mask_heads='retrieval,1.0': 'retrieval' stands alone",
    ),
    "rows too short for a needle": (
        lambda run, text: [str(run), "--length", "2"],
        "needle.length=2, as many as a row has, must leave",
    ),
    "a head that is not there": (lambda run, text: [str(run), "--heads", "0.6"], "0.6 is head 6"),
    "a masked head that is not there": (
        lambda run, text: [str(run), "--mask-heads", "9.0"],
        "mask_heads='9.0': 9.0 is in layer 9",
    ),
    "digits of another script": (lambda run, text: [str(run), "--heads", "٠.1"], "'٠.1' is no head; write LAYER.HEAD"),
    "heads by a wrong name": (lambda run, text: [str(run), "--mask-heads", "retreival"], "is no head; did you mean 'retrieval'?"),
    "no needle": (lambda run, text: [str(run), "--needle.prompts", "0"], "needle.prompts=0 must be a whole number from 1"),
    "a probe that is not there": (lambda run, text: [str(run), "--probe.only", "entropi"], "did you mean 'entropy'"),
    "a count without heads": (
        lambda run, text: [str(run), "--mask-count", "2"],
        "mask_count=2 is of --mask-heads retrieval or random",
    ),
    "more heads than there are": (
        lambda run, text: [str(run), "--mask-heads", "retrieval", "--mask-count", "10"],
        "mask_count=10 must be from 1 to 9, as the model has 18 heads and as many others are compared",
    ),
    "an option of training": (lambda run, text: [str(run), "--probe.sequences", "2"], "probe.sequences=2 is of training"),
    "a window that is not in the text": (
        lambda run, text: [str(run), "--tokens", "100:120"],
        "tokens='100:120' must begin before",
    ),
    "a row that is no row": (lambda run, text: [str(run), "--needle.length", "8"], "needle.length=8 must leave"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_inspected(case, run, text, capsys, monkeypatch):
    words, message = BAD[case]
    monkeypatch.setattr(inspecting, "probing", None)  # nothing has started
    given = words(run, text)
    assert main(["inspect", *given, *([] if "--text" in given else ["--text", str(text)])]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "inspect_0").exists()


def test_a_run_without_a_tokenizer_is_refused(run, text, monkeypatch, capsys):
    monkeypatch.setattr(inspecting, "opened", lambda *words: dataclasses.replace(opened(*words), tokenizer=None))
    assert main(["inspect", str(run), "--text", str(text)]) == 2
    assert "whose tokens are no text; give a run that was trained on text" in capsys.readouterr().err

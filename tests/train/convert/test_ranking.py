"""Layers are ranked by what their attention does: worked out by hand for a layer without logits, whose weights are all alike."""

import numpy as np
import pytest

from plait.launch import main
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.convert.reshapes import LENGTH, make_run, model_of
from plait.train.convert.linearize.ranking import rank
from plait.train.convert.options import GatesConfig
from plait.train.convert.sample import num_ids_of
from plait.train.convert.weights import ConvertError
from plait.train.run import opened

FLAT, FAR = 1, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three layers, of which the second looks at all tokens alike."""

    def flat(params):
        (path,) = (path for path in params if path.endswith("mixer.q.kernel"))
        params[path][FLAT] = 0

    return make_run(tmp_path_factory.mktemp("ranked") / "run", model_of(), flat)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The state of the union is what it was, and the state of the text too. " * 4)
    return path


def ranked(run, by, text=None, **options):
    return rank(run, by, text=text, **{"far": FAR, "seed": 0, "gates": GatesConfig(), **options})


def test_far_is_the_share_beyond_the_window(run, text):
    found = ranked(run, "far", text)
    queries = np.arange(FAR, LENGTH)
    assert_close(np.float32(found.heads[FLAT]), np.full(6, np.mean((queries - FAR + 1) / (queries + 1)), np.float32))
    assert_close(np.float32(found.layers[FLAT]), np.float32(np.mean(found.heads[FLAT])))


def test_weights_that_are_alike_are_the_least_spiky(run, text):
    found = ranked(run, "entropy", text)
    assert_close(np.float32(found.heads[FLAT]), np.zeros(6, np.float32))
    assert list(found.layers)[-1] == FLAT and sorted(found.layers) == [0, 1, 2]
    assert list(found.layers.values()) == sorted(found.layers.values(), reverse=True)
    assert found.pattern(found.kept(2), "lolcats") == "softmax,lolcats" and found.kept(1) == [next(iter(found.layers))]


def test_recall_is_of_the_strongest_head_in_tokens_that_come_twice(run):
    found = ranked(run, "recall")
    rows = np.tile(np.random.default_rng(0).integers(0, num_ids_of(opened(run)), (8, LENGTH // 2), np.int32), 2)
    again = [1 / (i + 1) for ids in rows for i in range(LENGTH) if ids[i] in ids[: max(i - 1, 0)]]
    assert_close(np.float32(found.layers[FLAT]), np.mean(again))
    for index, score in found.layers.items():
        assert score == max(found.heads[index])
    assert ranked(run, "recall").layers == found.layers


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: ranked(run, "far"), "by=far is measured on text; give --text FILE, or use --by recall"),
        (
            lambda run: ranked(run, "recall").kept(3),
            "keep=3 of 3 layers of softmax attention; it must be at least 1 and leave one",
        ),
        (lambda run: ranked(run, "recall").pattern([0], "retnet"), "student='retnet' cannot take the place of softmax attention"),
    ],
)
def test_what_cannot_be_ranked(ask, message, run):
    with pytest.raises(ConvertError, match=message):
        ask(run)


def test_rows_must_be_longer_than_far(run, text):
    with pytest.raises(ConvertError, match="far=16 must be below the run's rows of 16 tokens; use 2"):
        ranked(run, "far", text, far=LENGTH)


def test_linear_layers_stay_and_a_model_of_them_is_refused(tmp_path):
    mixers = {"gla": GLAConfig(num_heads=2, expand_k=0.6, expand_v=0.6), **model_of().mixers}
    hybrid = make_run(tmp_path / "hybrid", model_of(pattern="gla,softmax,softmax", mixers=mixers))
    found = ranked(hybrid, "recall")
    assert sorted(found.layers) == [1, 2] and found.pattern(found.kept(1), "lolcats").startswith("gla,")
    linear = make_run(tmp_path / "linear", model_of(pattern="gla", mixers={"gla": mixers["gla"]}))
    with pytest.raises(ConvertError, match="has 0 layers of plain softmax attention"):
        ranked(linear, "recall")


def test_the_command_shows_the_pattern(run, text, capsys):
    assert main(["convert", "rank", str(run), "--by", "entropy", "--text", str(text), "--keep", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '--pattern "softmax,lolcats"'

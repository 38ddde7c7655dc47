"""A sparse layer in rows that are too short for it is named, with what would leave tokens out."""

import dataclasses

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.launch import main
from plait.models.mixers.base import MIXERS
from plait.tests.train.common import tiny
from plait.train.loop import train
from plait.train.whole_rows import whole_rows

LENGTH = 256
SPARSE = [name for name, kind in MIXERS.all().items() if kind.kind == "sparse"]
OTHERWISE = ["blockrank", "landmark"]
"""See all by the text, or by an option, whatever the length."""


def told(*words):
    return whole_rows(parse_experiment("lm_quick", ["--data.seq-len", str(LENGTH), *words], prog="test"))


def test_a_notice_says_which_layer_and_what_would_be_less():
    (found,) = told("--model.pattern", "moba")
    assert found == (
        "moba (model.mixers.moba) sees all of a row of 256 tokens, as full attention does, with block_size=512; "
        "use --model.mixers.moba.block-size 64 or less, or a longer --data.seq-len"
    )
    (found,) = told("--model.pattern", "gla,nsa")
    both = "with top_k=16, window_size=512; use --model.mixers.nsa.top-k 3 or less with --model.mixers.nsa.window-size 128 or less, or a"
    assert both in found, "a window as long as a row sees all whatever is chosen"
    near = "--model.mixers.nsa.window-size"
    (found,) = told("--model.pattern", "nsa", near, "32")
    assert "use --model.mixers.nsa.top-k 3 or less, or a longer" in found
    few = ["--model.mixers.nsa.block-size", "16", "--model.mixers.nsa.top-k", "4"]
    (found,) = told("--model.pattern", "nsa", near, "256", *few)
    assert f"with window_size=256; use {near} 128 or less, or a" in found
    assert not told("--model.pattern", "nsa", near, "255", *few)
    (found,) = told("--model.pattern", "softmax,moh+softmax/near", "--model.mixers.moh+softmax/near.mixer.window-size", "256")
    assert found.startswith("softmax (model.mixers.moh+softmax/near.mixer) sees") and "mixer.window-size 128 or less" in found


@pytest.mark.parametrize("name", [name for name in SPARSE if name not in OTHERWISE])
def test_every_sparse_mixer_is_told_in_the_shortest_rows_alone(name):
    example = MIXERS.all()[name].example()
    at = lambda mixer, length: tiny(
        {"data.seq_len": length, "model.pattern": name, "model.d_model": 64, "model.mixers": {name: mixer}}
    )
    assert not whole_rows(at(example, LENGTH)), "far longer than what is seen"
    (found,) = whole_rows(at(example, 2))
    assert name in found and "a longer --data.seq-len" in found


def test_what_is_said_leaves_tokens_out():
    for name in (name for name in SPARSE if name != "blockrank"):  # which asks for ids, not for less
        for notice in told("--model.pattern", name):
            ways = [way.split(" with ") for way in notice.split("; use ")[1].split(", ") if way.startswith("--")]
            words = [[word for option in way for word in option.split()[:2]] for way in ways]
            assert all(not told("--model.pattern", name, *options) for options in words), notice


def test_layers_that_an_option_lets_see_all_are_told():
    (found,) = told("--model.pattern", "landmark")
    assert found == (
        "landmark (model.mixers.landmark) sees all of a row of 256 tokens, as full attention does, with top_k=None; "
        "use --model.mixers.landmark.top-k 2 or less"
    )
    few = ["--model.pattern", "landmark", "--model.mixers.landmark.top-k"]
    assert not told(*few, "2") and "with block_size=64, top_k=3; use --model.mixers.landmark.block-size" in told(*few, "3")[0]
    warm_up = ["--model.pattern", "dsa", "--model.mixers.dsa.stage", "warm_up"]
    (found,) = told(*warm_up)
    assert found == (
        "dsa (model.mixers.dsa) sees all of a row of 256 tokens, as full attention does, with stage=warm_up; "
        "use --model.mixers.dsa.stage sparse with --model.mixers.dsa.top-k 128 or less or a longer --data.seq-len"
    )
    (found,) = told(*warm_up, "--model.mixers.dsa.top-k", "255")
    assert found.endswith("with stage=warm_up; use --model.mixers.dsa.stage sparse")


def test_layers_that_see_all_of_some_texts_say_of_which():
    assert told("--model.pattern", "blockrank", "--model.mixers.blockrank.query-id", "7") == [
        "blockrank (model.mixers.blockrank) sees all of a row without tokens document_id=1 and query_id=7, as full attention does; "
        "use --model.mixers.blockrank.document-id and --model.mixers.blockrank.query-id of tokens that stand in the data"
    ]


def test_layers_that_are_meant_to_see_all_are_not_told():
    assert not told("--model.pattern", "softmax")
    assert not told("--model.pattern", "moba", "--model.mixers.moba.block-size", "64")


def test_training_and_plans_say_it_at_the_start(tmp_path, caplog, corpus, compile_cache):
    moba = dataclasses.replace(MIXERS.all()["moba"].example(), block_size=16)
    config = tiny({"data.seq_len": 16, "model.pattern": "moba", "model.mixers": {"moba": moba}})
    config = dataclasses.replace(
        config, steps=3, out=str(tmp_path / "run"), data=dataclasses.replace(config.data, source=str(corpus))
    )
    with caplog.at_level("INFO", "plait"):
        train(config)
    lines = [one.getMessage() for one in caplog.records]
    (at,) = [index for index, line in enumerate(lines) if line.startswith("moba (model.mixers.moba) sees all of a row of 16")]
    assert lines[at + 1].startswith("compiling a step of ")
    caplog.clear()
    model = ["--model.pattern", "moba", "--model.num-layers", "1", "--model.mixers.moba.head-dim", "8"]
    assert main(["plan", "lm_tiny", "--target", "cpu:1", "--out", str(tmp_path / "plan"), *model]) == 0
    assert "moba (model.mixers.moba) sees all of a row of" in caplog.text

"""`launch.py convert reshape`: what a user types, the commands of the docs, and what cannot be done."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from plait.launch import main
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.models.mixers.moh import MoHConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.positions.rotary_yarn import YarnRotaryConfig
from plait.tests.train.convert.reshapes import make_run, model_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "conversion.md"


def sums(folder):
    """The files of a folder with what is in them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_reshaped_run_is_one_to_score_to_read_and_to_hand_on(tmp_path, capsys):
    run = make_run(tmp_path / "run", model_of(num_layers=2))
    (run / "published").mkdir()
    (run / "published" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    text = tmp_path / "speech.txt"
    text.write_text("Fellow citizens of the Senate and of the House. " * 20, "utf-8")
    before = sums(run)
    do = lambda *words: main([*map(str, words)])
    assert do("convert", "reshape", run, tmp_path / "gqa", "kv_heads", "--num-kv-heads", 3, "--text", text) == 0
    said = capsys.readouterr().out
    assert "num_kv_heads: null -> 3" in said and "parameters  " in said and "32 tokens of text" in said and "mean KL" in said
    assert do("convert", "reshape", tmp_path / "gqa", tmp_path / "long", "rope", "--factor", 4, "--method", "yarn") == 0
    assert sums(run) == before
    longer = json.loads((tmp_path / "long" / "config.json").read_text())["model"]["mixers"]["softmax"]
    assert longer["positions"]["original_len"] == 64 and longer["num_kv_heads"] == 3
    assert do("eval", tmp_path / "long", "--data.source", text, "--batches", 1) == 0
    assert do("generate", tmp_path / "long", "--num-tokens", 4, "--prompt", "Fellow") == 0
    assert do("convert", "export", tmp_path / "long", tmp_path / "out") == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["model_type"], fields["num_key_value_heads"], fields["max_position_embeddings"]) == ("llama", 3, 256)
    assert fields["rope_parameters"]["rope_type"] == "yarn"


def documented():
    """The commands of the docs that reshape."""
    lines = re.findall(r"^python launch\.py (convert reshape .*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_commands_of_the_docs_run(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", model_of(d_model=256, num_heads=4, head_dim=64, num_layers=2))
    (tmp_path / "speech.txt").write_text("Fellow citizens of the Senate. ", "utf-8")
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert {words[4] for words in documented()} == {"kv_heads", "moh", "mla", "depth", "window", "vocab", "rope", "sparse"}
        for words in documented():
            assert main(words) == 0, words
            assert (tmp_path / words[3] / "reshape.json").is_file()
    finally:
        os.chdir(here)
    assert capsys.readouterr().out.count("mean KL") == len(documented())


MODELS = {
    "plain": model_of(),
    "gqa": model_of(num_kv_heads=3),
    "normed": model_of(qk_norm=True),
    "alibi": model_of(positions=ALiBiConfig()),
    "yarn": model_of(positions=YarnRotaryConfig()),
    "little turned": model_of(positions=RotaryConfig(fraction=0.5)),
    "gla": model_of(pattern="gla", mixers={"gla": GLAConfig(num_heads=2)}),
    "mixture": model_of(pattern="moh+softmax", mixers={"moh+softmax": MoHConfig(mixer=model_of().mixers["softmax"])}),
    "shared": model_of(
        pattern="softmax/w,softmax/r",
        num_layers=2,
        mixers={f"softmax/{kind[0]}": SoftmaxConfig(num_heads=6, head_dim=4, shared_kv=kind) for kind in ("write", "read")},
    ),
}
CASES = {
    "unknown kind": ("plain", "kvheads", "reshape 'kvheads' is not registered; did you mean 'kv_heads'?"),
    "no number": ("plain", "kv_heads --num-kv-heads", "num_kv_heads has no value; write one after --num-kv-heads"),
    "another's option": ("plain", "vocab --kv-rank 3", "'--kv-rank' is not an option of"),
    "no divisor": (
        "gqa",
        "kv_heads --num-kv-heads 2",
        "num_kv_heads=2 must divide the 3 key and value heads of model.mixers.softmax; use one of 1, 3",
    ),
    "no key heads": ("plain", "kv_heads --num-kv-heads 0", "num_kv_heads=0 must be a whole number from 1"),
    "norms in key-driven groups": (
        "normed",
        "kv_heads --num-kv-heads 2 --grouping key_driven",
        "model.mixers.softmax.qk_norm=True, which kdgqa has not",
    ),
    "one half of a share": ("shared", "kv_heads --num-kv-heads 2 --layers 0", "the carry 'kv'"),
    "no softmax": ("gla", "kv_heads --num-kv-heads 2", "model.pattern='gla' has no layer with softmax attention"),
    "no such layer": ("plain", "window --window-size 4 --layers 0,7", "layers.1=7 is not there (num_layers=3)"),
    "no layers": ("plain", "window --window-size 4 --layers x", "layers='x' must be values with commas between them"),
    "too many heads": ("plain", "moh --top-k 5", "top_k=5 must be at most the 3 routed heads; use 3 or less"),
    "two routed heads or fewer": ("plain", "moh --num-shared-heads 5", "num_shared_heads=5 must leave three heads of 6"),
    "a mixture already": ("mixture", "moh", "has no layer with softmax attention that is no mixture"),
    "rank too high": ("plain", "mla --kv-rank 21", "kv_rank=21 must be at most 20"),
    "norms in MLA": ("normed", "mla --kv-rank 4", "model.mixers.softmax.qk_norm=True, which MLA has not"),
    "ALiBi in MLA": ("alibi", "mla --kv-rank 4", "model.mixers.softmax.positions='alibi' are none that MLA has"),
    "a longer pattern than the model": ("plain", "depth", "pattern='keep*3,drop' has 4 layers; it must fit in num_layers=3"),
    "a layer too many": ("plain", "depth --keep 1,3", "keep.1=3 must be below num_layers=3"),
    "other words": ("plain", "depth --pattern keep,skip", "has 'skip'; it must be of keep, drop"),
    "all dropped": ("plain", "depth --pattern drop", "drops all 3 layers"),
    "sinks without a window": ("plain", "window --window-size None --num-sink-tokens 2", "num_sink_tokens=2 needs a window"),
    "too few ids": ("plain", "vocab --vocab-size 256", "vocab_size=256 must hold the 257 ids of the run's data; use 257 or more"),
    "shrunk positions": ("plain", "rope --factor 0.5", "factor=0.5 must be a finite number of at least 1"),
    "stretched already": ("yarn", "rope --factor 2", "has no layer with plain rotary embedding and no window"),
    "one pair": ("little turned", "rope --factor 2 --method ntk", "two pairs are needed"),
    "no such mixer": (
        "plain",
        "sparse --pattern nsa",
        "gives layer 0 'nsa'; it must be 'softmax', which is there, or one of softmax, bigbird",
    ),
    "parameters of another kind": (
        "gla",
        "sparse",
        "gives layer 0 'moba', and it is gla, which has other parameters; leave it 'gla'",
    ),
    "nothing to be sparse": (
        "plain",
        "sparse --pattern softmax",
        "pattern='softmax' changes no layer of model.pattern='softmax'; name one",
    ),
    "an option of none": (
        "plain",
        "sparse --plan x.json",
        "plan=x.json is of no mixer that pattern='moba' puts in place; leave it out",
    ),
    "no block": ("plain", "sparse --top-k 0", "top_k=0 must be a whole number from 1"),
    "no plan": ("plain", "sparse --pattern moa --plan nowhere.json", "plan='nowhere.json' cannot be read"),
    "ALiBi among what is chosen": ("alibi", "sparse", "positions=alibi adds to the logits"),
    "no text": ("plain", "vocab --vocab-size 300 --text nowhere.txt", "text='nowhere.txt' cannot be read"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by the names of their models, made when they are asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            made[name] = make_run(folder / name.replace(" ", "_"), MODELS[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_and_nothing_is_written(name, runs, tmp_path, capsys):
    model, words, message = CASES[name]
    assert main(["convert", "reshape", str(runs(model)), str(tmp_path / "new"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reshape"], "run is missing"),
        (["reshape", "a", "b"], "kind is missing"),
        (["reshape", "--kind", "moh"], "'--kind' is not an option of"),
        (["reshape", "nowhere", "new", "moh"], "'nowhere' is not a run folder"),
    ],
)
def test_words_that_are_missing_are_said(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(runs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["convert", "reshape", str(runs("plain")), str(tmp_path), "moh"]) == 2
    assert "is there already" in capsys.readouterr().err and sums(tmp_path).keys() == {"notes.txt"}


def test_what_fails_on_the_way_leaves_nothing(runs, tmp_path, monkeypatch):
    from plait.train.convert import reshaping

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(reshaping, "write_json", fail)
    assert main(["convert", "reshape", str(runs("plain")), str(tmp_path / "new"), "depth", "--keep", "0"]) != 0
    assert list(tmp_path.iterdir()) == []

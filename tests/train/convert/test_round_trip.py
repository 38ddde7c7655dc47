"""A trained run out as a published model and in again, by the commands that a user types."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from plait.launch import main

TRAIN = "--steps 2 --optimizer.warmup-steps 1 --mesh.data 1 --eval-batches 2 --data.tokenizer byte --data.batch-size 16"


def do(*words):
    assert main([*map(str, words)]) == 0


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ("--model.pattern softmax --model.sigma-reparam spectral", "llama"),
        pytest.param("--model.pattern gated_deltanet,softmax", "plait", marks=pytest.mark.slow),
    ],
    ids=["a home of another's, folded", "its own"],
)
def test_out_and_in_again(options, model_type, compile_cache, tmp_path, capsys):
    run, folder, again, back = (tmp_path / name for name in ("run", "model", "again", "back"))
    do("train", "lm_tiny", *TRAIN.split(), *options.split(), "--out", run)
    do("convert", "export", run, folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one file may read all
    do("convert", "inspect", folder)
    do("convert", "import", folder, again)
    do("convert", "export", again, back)
    assert (folder / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (back / name).read_bytes(), name
    scores = []
    for one in (run, again):
        do("eval", one, "--batches", 2, "--data.source", "sotu", "--out", tmp_path / f"scores-{one.name}.json")
        scores.append(json.loads((tmp_path / f"scores-{one.name}.json").read_text()))
    losses = [next(value for key, value in flat(score).items() if key.endswith("bits_per_byte")) for score in scores]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    capsys.readouterr()
    do("generate", run, "--num-tokens", 8, "--temperature", 0, "--prompt", "Fellow")
    do("generate", again, "--num-tokens", 8, "--temperature", 0, "--prompt", "Fellow")
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]


def flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, item in tree.items() for key, value in flat(item, f"{path}.{name}").items()}


def test_dtype_and_shards(compile_cache, tmp_path):
    from plait.train.convert.exporting import export_model

    run = tmp_path / "run"
    do("train", "lm_tiny", *TRAIN.split(), "--model.pattern", "gated_deltanet,softmax", "--out", run)
    export_model(run, tmp_path / "whole", dtype="bfloat16")
    export_model(run, tmp_path / "parts", dtype="bfloat16", shard_bytes=20_000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == whole.keys()
    rates = {name for name in whole if name.endswith((".A_log", ".dt_bias"))}
    assert {name for name, value in whole.items() if value.dtype == np.float32} == rates
    assert {value.dtype.name for name, value in whole.items() if name not in rates} == {"bfloat16"}
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "parts" / file)[name], whole[name])
    do("convert", "inspect", tmp_path / "parts")

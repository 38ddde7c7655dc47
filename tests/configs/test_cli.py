"""From words of a command line to a config."""

import pytest

from plait.configs.cli import parse_experiment
from plait.configs.presets import preset
from plait.launch import main
from plait.tests.train.common import get_leaf

OVERRIDES = {
    "top level": ("--steps 17 --out runs/x --no-resume", {"steps": 17, "out": "runs/x", "resume": False}),
    "switch": ("--resume", {"resume": True}),
    "none": ("--probe-every None --optimizer.clip-norm None", {"probe_every": None, "optimizer.clip_norm": None}),
    "underscores": ("--log_every 3 --data.batch_size 16", {"log_every": 3, "data.batch_size": 16}),
    "equals sign": ("--model.d-model=48 --optimizer.learning-rate=3e-4", {"model.d_model": 48, "optimizer.learning_rate": 3e-4}),
    "mixer of the preset": ("--model.mixers.softmax.window-size 9", {"model.mixers.softmax.window_size": 9}),
    "choices": ("--model.sigma-reparam one --model.remat full", {"model.sigma_reparam": "one", "model.remat": "full"}),
    "mesh": ("--mesh.data 2 --mesh.fsdp 4", {"mesh.data": 2, "mesh.fsdp": 4}),
}
PATTERNS = {
    "a new mixer with its options": (
        "--model.pattern gla,softmax --model.mixers.gla.num-heads 2",
        ("gla", "softmax"),
        {"model.mixers.gla.num_heads": 2, "model.mixers.softmax.head_dim": 16},
    ),
    "options before the pattern": (
        "--model.mixers.gla.num-heads 2 --model.pattern gla",
        ("gla", "gla"),
        {"model.mixers.gla.num_heads": 2},
    ),
    "deeper": (
        "--model.pattern gla*3,softmax --model.num-layers 5",
        ("gla", "gla", "gla", "softmax", "gla"),
        {"model.num_layers": 5},
    ),
    "depth before the pattern": ("--model.num-layers=4 --model.pattern=gla*3,softmax", ("gla",) * 3 + ("softmax",), {}),
    "ratio": ("--model.pattern gla:softmax=3:1 --model.num-layers 4", ("gla",) * 3 + ("softmax",), {}),
    "places": ("--model.pattern softmax@1;gla --model.num-layers 3", ("gla", "softmax", "gla"), {}),
    "mixture of heads": (
        "--model.pattern moh+softmax --model.mixers.moh+softmax.mixer.head-dim 8 --model.mixers.moh+softmax.top-k 1",
        ("moh+softmax",) * 2,
        {"model.mixers.moh+softmax.mixer.head_dim": 8, "model.mixers.moh+softmax.top_k": 1},
    ),
    "labels": (
        "--model.pattern softmax/local,softmax --model.mixers.softmax/local.head-dim 8 --model.mixers.softmax/local.window-size=5",
        ("softmax/local", "softmax"),
        {"model.mixers.softmax/local.window_size": 5, "model.mixers.softmax.window_size": None},
    ),
    "defaults that fit only the new width": ("--model.pattern moh+softmax --model.d-model 256", ("moh+softmax",) * 2, {}),
    "the last of two patterns": ("--model.pattern gla --model.pattern softmax", ("softmax", "softmax"), {}),
}


@pytest.mark.parametrize(("words", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_override(words, expected):
    config = parse_experiment("lm_tiny", words.split())
    assert {path: get_leaf(config, path) for path in expected} == expected


@pytest.mark.parametrize(("words", "layers", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_pattern_brings_its_mixers(words, layers, expected):
    config = parse_experiment("lm_tiny", words.split())
    assert config.model.layers == layers and set(config.model.mixers) == set(layers)
    assert {path: get_leaf(config, path) for path in expected} == expected


def test_nothing_given_is_the_preset():
    assert parse_experiment("lm_tiny", []) == preset("lm_tiny")


REFUSED = {
    "command": ("trian lm_tiny", "'train'"),
    "preset": ("train lm_tniy", "'lm_tiny'"),
    "no preset": ("train", "needs a preset"),
    "option before the preset": ("train --steps 3", "needs a preset"),
    "mixer": ("train lm_tiny --model.pattern sofmax", "'softmax'"),
    "wrapped mixer": ("train lm_tiny --model.pattern moh+sofmax", "'softmax'"),
    "wrapper": ("train lm_tiny --model.pattern mho+softmax", "'moh'"),
    "option": ("train lm_tiny --optimizer.learning-rat 1", "--optimizer.learning-rate"),
    "option of a mixer that is not in the pattern": ("train lm_tiny --model.mixers.gla.num-heads 2", "--model.mixers"),
    "choice": ("train lm_tiny --optimizer.schedule cosin", "cosine"),
    "text for a number": ("train lm_tiny --steps many", "many"),
    "value out of range": ("train lm_tiny --optimizer.learning-rate -1", "must be positive"),
    "heads that do not divide the width": (
        "train lm_tiny --model.pattern softmax --model.d-model 40 --model.mixers.softmax.num-heads None",
        "d_model=40",
    ),
    "key heads that do not divide the heads": (
        "train lm_tiny --model.mixers.softmax.num-heads 4 --model.mixers.softmax.num-kv-heads 3",
        "num_kv_heads=3",
    ),
    "window 0": ("train lm_tiny --model.mixers.softmax.window-size 0", "window_size=0"),
    "pattern longer than the model": ("train lm_tiny --model.pattern gla*3,softmax", "num_layers=2"),
    "pattern with a hole": ("train lm_tiny --model.pattern softmax@1", "leaves layers 0"),
    "pattern that cannot be read": ("train lm_tiny --model.pattern gla**2", "needs a positive count"),
    "empty pattern": ("train lm_tiny --model.pattern=", "model.pattern"),
    "warm-up longer than the run": ("train lm_tiny --steps 5", "warmup_steps=10 must be below steps=5"),
    "accumulation that does not divide": ("train lm_tiny --optimizer.accumulate 3", "must divide data.batch_size=8"),
    "mesh axis 0": ("train lm_tiny --mesh.fsdp 0", "mesh.fsdp=0"),
    "list of nothing": ("list", "list needs one of"),
    "list of something else": ("list preset", "presets"),
    "task": ("eval runs/none --tasks pppl", "ppl"),
    "eval of no run": ("eval {tmp}/none", "is not a run folder"),
    "generate from no run": ("generate {tmp}/none", "is not a run folder"),
    "temperature below 0": ("generate {tmp}/none --temperature -1", "temperature=-1.0"),
    "top-k 0": ("generate {tmp}/none --top-k 0", "top_k=0"),
    "top-p above 1": ("generate {tmp}/none --top-p 1.5", "top_p=1.5"),
    "report of nothing": ("report", "at least one run folder"),
}


@pytest.mark.parametrize(("words", "hint"), REFUSED.values(), ids=REFUSED)
def test_bad_command_line_exits_2_and_says_what_is_near(words, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    status = run_main(words.format(tmp=tmp_path).split(" "))
    printed = "".join(capsys.readouterr())
    assert status == 2 and hint in printed and "Traceback" not in printed, printed
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    "words", ["--help", "train lm_tiny --help", "generate --help", "list presets", "list mixers", "list tasks", "list kernels"]
)
def test_help_and_lists_exit_0(words, capsys):
    assert run_main(words.split()) == 0
    assert capsys.readouterr().out.strip()


def run_main(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as error:  # tyro ends the process itself
        return error.code or 0

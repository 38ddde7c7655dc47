"""From words of a command line to a config."""

import pytest

from plait.configs.codec import decode, encode, leaves
from plait.configs.command_line.cli import parse_experiment
from plait.configs.experiment import ExperimentConfig
from plait.configs.listing import TABLES
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
    "with an underscore in a flag": ("--model.num_layers=4 --model.pattern=retnet", ("retnet",) * 4, {}),
}
COMPONENTS = {
    # words: the pattern, leaves
    "a mixer": (
        "--model.mixers.softmax gla --model.mixers.softmax.num-heads 2",
        "gated_deltanet,gla",
        {"model.mixers.gla.num_heads": 2, "model.mixers.gated_deltanet.head_dim": 8},
    ),
    "a mixer, with an equals sign and underscores": (
        "--model.mixers.gated_deltanet=gla --model.mixers.gated_deltanet.num_heads=2",
        "gla,softmax",
        {"model.mixers.gla.num_heads": 2},
    ),
    "the same mixer": ("--model.mixers.softmax softmax", "gated_deltanet,softmax", {"model.mixers.softmax.head_dim": 16}),
    "the last of two": ("--model.mixers.softmax retnet --model.mixers.softmax=gla", "gated_deltanet,gla", {}),
    "a mixer of a new pattern, its options before it": (
        "--model.mixers.retnet.num-heads 2 --model.mixers.retnet gla --model.pattern softmax*1,retnet",
        "softmax*1,gla",
        {"model.mixers.gla.num_heads": 2},
    ),
    "a mixer with a label": (
        "--model.pattern softmax/local,softmax --model.mixers.softmax/local gla",
        "gla/local,softmax",
        {"model.mixers.softmax.head_dim": 16},
    ),
    "a mixer in a wrapper": (
        "--model.pattern gla,moh+softmax --model.mixers.moh+softmax.mixer gla --model.mixers.moh+softmax.mixer.gate-rank 4 "
        "--model.mixers.moh+softmax.top-k 2",
        "gla,moh+gla",
        {"model.mixers.moh+gla.mixer.gate_rank": 4, "model.mixers.gla.gate_rank": 16, "model.mixers.moh+gla.top_k": 2},
    ),
    "a wrapper with its mixer": (
        "--model.mixers.softmax moh+gla --model.mixers.softmax.mixer.gate-rank 4",
        "gated_deltanet,moh+gla",
        {"model.mixers.moh+gla.mixer.gate_rank": 4},
    ),
    "a part": (
        "--model.d-model 64 --model.pattern parallel --model.mixers.parallel.parts.1 gla "
        "--model.mixers.parallel.parts.1.gate-rank 4 --model.mixers.parallel.parts.0.head-dim 16",
        "parallel",
        {"model.mixers.parallel.parts.1.gate_rank": 4, "model.mixers.parallel.parts.0.head_dim": 16},
    ),
    "numbers with commas between them": (
        "--model.pattern parallel --model.mixers.parallel.in-multipliers 0.5,2 --model.d-model 64",
        "parallel",
        {"model.mixers.parallel.in_multipliers.0": 0.5, "model.mixers.parallel.in_multipliers.1": 2.0},
    ),
    "a mixer in a wrapper in a part": (
        "--model.pattern parallel --model.mixers.parallel.parts.1.mixer gla --model.mixers.parallel.parts.1.mixer.gate-rank=4 "
        "--model.mixers.parallel.parts.1 moh+softmax --model.d-model 64",
        "parallel",
        {"model.mixers.parallel.parts.1.mixer.gate_rank": 4},
    ),
    "an optimizer, which keeps what all have": (
        "--optimizer muon --optimizer.ns-steps 3 --optimizer.learning-rate 2e-2",
        "gated_deltanet,softmax",
        {
            "optimizer.optimizer_name": "muon",
            "optimizer.learning_rate": 2e-2,
            "optimizer.warmup_steps": 10,
            "optimizer.ns_steps": 3,
        },
    ),
    "an optimizer with a rate of its own": (
        "--optimizer=sgd",
        "gated_deltanet,softmax",
        {"optimizer.optimizer_name": "sgd", "optimizer.learning_rate": 3e-2, "optimizer.warmup_steps": 10},
    ),
    "a task": (
        "--data.task mqar --data.task.vocab-size 128",
        "gated_deltanet,softmax",
        {"data.task.task_name": "mqar", "data.task.vocab_size": 128, "data.seq_len": 64},
    ),
    "a channel mixer": (
        "--model.channel-mixer gated_mlp --model.channel-mixer.activation gelu",
        "gated_deltanet,softmax",
        {"model.channel_mixer.hidden_dim": 64, "model.channel_mixer.activation": "gelu"},
    ),
    "a channel mixer of some layers": (
        "--model.pattern gla,gated_deltanet --model.channel-mixers.gated-deltanet moe --model.channel-mixers.gated-deltanet.top-k 3",
        "gla,gated_deltanet",
        {
            "model.channel_mixer.channel_mixer_name": "gated_mlp",
            "model.channel_mixers.gated_deltanet.channel_mixer_name": "moe",
            "model.channel_mixers.gated_deltanet.top_k": 3,
        },
    ),
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


@pytest.mark.parametrize(("words", "pattern", "expected"), COMPONENTS.values(), ids=COMPONENTS)
def test_components_are_exchanged_by_name(words, pattern, expected):
    config = parse_experiment("lm_tiny", words.split())
    assert config.model.pattern == pattern and set(config.model.mixers) == set(config.model.layers)
    found = leaves(encode(config))
    assert {path: found[path] for path in expected} == expected
    assert decode(ExperimentConfig, encode(config)) == config


def test_help_says_which_components_there_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert run_main(["train", "lm_tiny", "--model.pattern", "gla,moh+softmax", "--help"]) == 0
    printed = capsys.readouterr().out
    mixers = "--model.mixers.gla, --model.mixers.moh+softmax, --model.mixers.moh+softmax.mixer: aaren, base_conv, "
    assert mixers in printed and "--model.channel-mixers.moh+softmax: gaam, gated_mlp" in printed


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
    "value out of range": (
        "train lm_tiny --optimizer.learning-rate -1",
        "error: optimizer.learning_rate=-1.0 must be a finite number above 0",
    ),
    "heads that do not divide the width": (
        "train lm_tiny --model.pattern softmax --model.d-model 40 --model.mixers.softmax.num-heads None",
        "d_model=40",
    ),
    "key heads that do not divide the heads": (
        "train lm_tiny --model.mixers.softmax.num-heads 4 --model.mixers.softmax.num-kv-heads 3",
        "num_kv_heads=3",
    ),
    "window 0": ("train lm_tiny --model.mixers.softmax.window-size 0", "error: model.mixers.softmax.window_size=0"),
    "pattern longer than the model": ("train lm_tiny --model.pattern gla*3,softmax", "num_layers=2"),
    "pattern with a hole": ("train lm_tiny --model.pattern softmax@1", "leaves layers 0"),
    "pattern that cannot be read": ("train lm_tiny --model.pattern gla**2", "needs a positive count"),
    "empty pattern": ("train lm_tiny --model.pattern=", "model.pattern=''"),
    "no pattern": ("train lm_tiny --model.pattern", "model.pattern has no value"),
    "channel mixer": (
        "train lm_tiny --model.channel-mixer gated_mpl",
        "error: model.channel_mixer='gated_mpl': channel mixer 'gated_mpl' is not registered; did you mean 'gated_mlp'?",
    ),
    "width of which nothing is left": (
        "train lm_tiny --model.pattern gla --model.mixers.gla.num-heads 4 --model.mixers.gla.expand-k 0.001",
        "error: model.mixers.gla.expand_k=0.001 must leave at least one of d_model=32 channels; use 0.03125 or more",
    ),
    "heads that leave no pair": (
        "train lm_tiny --model.pattern retnet --model.mixers.retnet.num-heads 32",
        "error: model.mixers.retnet.num_heads=32 must divide d_model / 2=16; use one of 1, 2, 4, 8, 16",
    ),
    "rows longer than a mixer's table of positions": (
        "train lm_tiny --model.mixers.softmax.positions learned --model.mixers.softmax.positions.max-len 10",
        "error: data.seq_len=64 must be at most the 10 tokens of model.mixers.softmax; use shorter rows",
    ),
    "rows longer than the model's table of positions": (
        "train lm_tiny --model.positions learned --model.positions.max-len 10",
        "error: data.seq_len=64 must be at most the 10 tokens of model.positions; use shorter rows",
    ),
    "text in a list of numbers": (
        "train lm_tiny --model.pattern parallel --model.mixers.parallel.in-multipliers 1,x",
        "in_multipliers='1,x' must be values with commas between them, each a finite number above 0",
    ),
    "channel mixer of a mixer that is not there": (
        "train lm_tiny --model.channel-mixers.gla moe",
        "'--model.channel-mixers.gla' is not an option",
    ),
    "channel mixer without a name": ("train lm_tiny --model.channel-mixer --steps 3", "model.channel_mixer has no value"),
    "optimizer": (
        "train lm_tiny --optimizer muno",
        "error: optimizer='muno': optimizer 'muno' is not registered; did you mean 'muon'?",
    ),
    "value of an exchanged optimizer": (
        "train lm_tiny --optimizer muon --optimizer.ns-steps 0",
        "error: optimizer.ns_steps=0 must be",
    ),
    "option of the optimizer before": ("train lm_tiny --optimizer sgd --optimizer.b1 0.9", "--optimizer.b1"),
    "task that the rows cannot hold": (
        "train lm_tiny --data.task mqar --data.task.num-kv-pairs 40",
        "error: data.task.num_kv_pairs=40 must be at most a quarter of data.seq_len=64",
    ),
    "component of another kind": ("train lm_tiny --model.channel-mixer gla", "channel mixer 'gla' is not registered"),
    "mixer named by its place": (
        "train lm_tiny --model.mixers.softmax sofmax",
        "error: model.mixers.softmax='sofmax': mixer 'sofmax' is not registered; did you mean 'softmax'?",
    ),
    "mixer that the pattern has": (
        "train lm_tiny --model.mixers.softmax gated_deltanet --model.mixers.softmax.head-dim 8",
        "error: model.mixers.softmax='gated_deltanet' is in pattern='gated_deltanet,softmax' already",
    ),
    "wrapper around nothing": ("train lm_tiny --model.mixers.softmax moh", "name a mixer after it, as in 'moh+softmax'"),
    "wrapper in a wrapper": (
        "train lm_tiny --model.pattern moh+softmax --model.mixers.moh+softmax.mixer moh+gla",
        "model.mixers.moh+softmax.mixer=moh is itself around a mixer",
    ),
    "value of an exchanged mixer, by the typed path": (
        "train lm_tiny --model.pattern moh+softmax --model.mixers.moh+softmax.mixer gla --model.mixers.moh+softmax.mixer.num-heads 0",
        "error: model.mixers.moh+softmax.mixer.num_heads=0 must be a whole number from 1",
    ),
    "exchanged mixer that does not fit, by the typed path": (
        "train lm_tiny --model.mixers.softmax gla --model.mixers.softmax.num-heads 5",
        "error: model.mixers.softmax.num_heads=5 must divide",
    ),
    "value of a part": (
        "train lm_tiny --model.pattern parallel --model.mixers.parallel.parts.0.num-heads 0",
        "error: model.mixers.parallel.parts.0.num_heads=0 must be a whole number from 1",
    ),
    "part that is not there": (
        "train lm_tiny --model.pattern parallel --model.mixers.parallel.parts.2 gla",
        "--model.mixers.parallel.parts",
    ),
    "value of a labelled mixer": (
        "train lm_tiny --model.pattern softmax/local,softmax --model.mixers.softmax/local.num-heads 0",
        "error: model.mixers.softmax/local.num_heads=0 must be a whole number from 1",
    ),
    "label that does not fit the width": (
        "train lm_tiny --model.pattern softmax/local --model.d-model 40",
        "error: model.mixers.softmax/local.head_dim=64 must divide d_model=40",
    ),
    "warm-up longer than the run": ("train lm_tiny --steps 5", "warmup_steps=10 must be below steps=5"),
    "accumulation that does not divide": ("train lm_tiny --optimizer.accumulate 3", "must divide data.batch_size=8"),
    "mesh axis 0": ("train lm_tiny --mesh.fsdp 0", "error: mesh.fsdp=0 must be a whole number from 1"),
    "list of nothing": ("list", "list needs one of"),
    "list of something else": ("list preset", "presets"),
    "task": ("eval runs/none --tasks pppl", "ppl"),
    "eval of no run": ("eval {tmp}/none", "is not a run folder"),
    "generate from no run": ("generate {tmp}/none", "is not a run folder"),
    "temperature below 0": ("generate {tmp}/none --temperature -1", "temperature=-1.0"),
    "top-k 0": ("generate {tmp}/none --top-k 0", "top_k=0"),
    "top-p above 1": ("generate {tmp}/none --top-p 1.5", "top_p=1.5"),
    "report of nothing": ("report", "error: runs is missing"),
}


@pytest.mark.parametrize(("words", "hint"), REFUSED.values(), ids=REFUSED)
def test_bad_command_line_exits_2_and_says_what_is_near(words, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    status = run_main(words.format(tmp=tmp_path).split(" "))
    printed = "".join(capsys.readouterr())
    assert status == 2 and hint in printed and "Traceback" not in printed, printed
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("words", ["--help", "train lm_tiny --help", "generate --help", *(f"list {what}" for what in TABLES)])
def test_help_and_lists_exit_0(words, capsys):
    assert run_main(words.split()) == 0
    assert capsys.readouterr().out.strip()


def run_main(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as error:  # tyro ends the process itself
        return error.code or 0

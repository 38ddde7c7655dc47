"""Studies and lists of values: which rows there are."""

import dataclasses

import pytest

from plait.configs.command_line.cli import parse_experiment
from plait.configs.experiment import ExperimentConfig
from plait.configs.presets import preset, presets
from plait.configs.sweeps.base import SWEEPS
from plait.configs.sweeps.lists import multiplied
from plait.configs.sweeps.rows import chain, each, product, replaced, seeds, words, zipped
from plait.train.commands.sweep import SweepArgs


def test_rows_are_put_together():
    width, rate = each("w", 1, 2), each("r", 0.1, 0.2)
    assert product(width, rate) == ({"w": 1, "r": 0.1}, {"w": 1, "r": 0.2}, {"w": 2, "r": 0.1}, {"w": 2, "r": 0.2})
    assert zipped(width, rate) == ({"w": 1, "r": 0.1}, {"w": 2, "r": 0.2})
    assert chain(width, rate) == ({"w": 1}, {"w": 2}, {"r": 0.1}, {"r": 0.2})
    assert product(width) == width and product() == ({},)
    assert seeds(2) == ({"seed": 0, "data.seed": 0}, {"seed": 1, "data.seed": 1})
    assert replaced(product(width, rate), {"r": 1.0}) == ({"w": 1, "r": 1.0}, {"w": 2, "r": 1.0}), "equal rows count once"


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="w is in two parts of a product; give its values once"):
        product(each("w", 1), each("w", 2))
    with pytest.raises(ValueError, match="zipped parts have 2, 3 rows; give as many of each"):
        zipped(each("a", 1, 2), each("b", 1, 2, 3))


def test_rows_are_words_of_train():
    row = {
        "model.tie_embeddings": True,
        "model.causal": False,
        "probe_every": None,
        "model.pattern": "gla*3,softmax",
        "m": (1.0, 2.0),
    }
    assert words(row) == [
        "--model.tie-embeddings",
        "--model.no-causal",
        "--probe-every=None",
        "--model.pattern=gla*3,softmax",
        "--m=1.0,2.0",
    ]


@pytest.mark.parametrize("name", list(SWEEPS))
def test_every_row_of_a_study_is_an_experiment(name):
    study = SWEEPS[name]()
    rows = study.rows()
    assert len(rows) > 1 and len({str(row) for row in rows}) == len(rows)
    for row in rows:
        parse_experiment(study.preset, words(row))
    assert f"`python launch.py sweep {name} " in (SWEEPS[name].__doc__ or "")


def test_names_tell_studies_presets_and_options_apart():
    assert not set(SWEEPS) & set(presets())
    taken = {field.name for one in (ExperimentConfig, SweepArgs) for field in dataclasses.fields(one)}
    for study in SWEEPS.all().values():
        assert not taken & {field.name for field in dataclasses.fields(study)}, study.name


LISTS = {
    "numbers": ("--seed 0,1", [{"seed": "0"}, {"seed": "1"}]),
    "written with =": ("--seed=0,1", [{"seed": "0"}, {"seed": "1"}]),
    "two keys": ("--steps 5,6 --seed 1,2", [{"steps": s, "seed": n} for s in "56" for n in "12"]),
    "off": ("--probe-every None,5", [{"probe_every": "None"}, {"probe_every": "5"}]),
    "choices": ("--optimizer.schedule wsd,cosine", [{"optimizer.schedule": "wsd"}, {"optimizer.schedule": "cosine"}]),
    "switches": ("--model.tie-embeddings True,False", [{"model.tie_embeddings": True}, {"model.tie_embeddings": False}]),
    "a switch": ("--model.no-causal", [{"model.causal": False}]),
    "a pattern is one": ("--model.pattern gla*3,softmax", [{"model.pattern": "gla*3,softmax"}]),
    "a text is one": ("--probe.only default,induction", [{"probe.only": "default,induction"}]),
    "numbers of one value": ("--model.channel-mixer.multipliers 1,2", [{"model.channel_mixer.multipliers": "1,2"}]),
    "patterns": (
        "--model.pattern gla*3,softmax --model.pattern softmax",
        [{"model.pattern": "gla*3,softmax"}, {"model.pattern": "softmax"}],
    ),
    "components": ("--optimizer adamw,muon", [{"optimizer": "adamw"}, {"optimizer": "muon"}]),
    "options of a component that another flag brings": (
        "--optimizer.adam-learning-rate 1,2 --optimizer muon",
        [{"optimizer.adam_learning_rate": n, "optimizer": "muon"} for n in "12"],
    ),
    "options of a mixer that a pattern brings": (
        "--model.pattern gla --model.mixers.gla.num-heads 1,2",
        [{"model.pattern": "gla", "model.mixers.gla.num_heads": n} for n in "12"],
    ),
    "events": ("--event.loss-spike.action stop,warn", [{"event.loss_spike.action": one} for one in ("stop", "warn")]),
    "unknown is left for its row": ("--model.widht 1,2", [{"model.widht": "1,2"}]),
}


@pytest.mark.parametrize(("args", "rows"), LISTS.values(), ids=LISTS)
def test_commas_part_values_but_not_texts(args, rows):
    assert list(multiplied(preset("lm_tiny"), ({},), args.split())) == rows


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("seed 0,1", "'seed' is no option; write --KEY VALUE"),
        ("--seed 0,,1", "seed='0,,1' has an empty value"),
        ("--seed 0,1 --seed 1", "seed has the value '1' twice; give each once, or use --seeds"),
    ],
)
def test_lists_that_are_none_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        multiplied(preset("lm_tiny"), ({},), args.split())


def test_lists_replace_values_of_a_study():
    rows = product(each("model.pattern", "gla", "softmax"), each("steps", 5, 6))
    found = multiplied(preset("lm_tiny"), rows, ["--steps", "7", "--seed", "1,2"])
    assert list(found) == [{"model.pattern": p, "steps": "7", "seed": n} for n in "12" for p in ("gla", "softmax")]

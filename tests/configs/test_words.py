"""Words of a command line: what they set, and the one line that each wrong one is answered with."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from plait.configs.command_line.words import parse
from plait.configs.components import Config
from plait.configs.domains import Heads, Line, Number
from plait.launch import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    """What lies in others."""

    num_heads: Heads | None = 4
    rate: Annotated[float, Number(above=0, most=1)] = 0.5
    only: Line | None = "all"
    warm: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """With an option of every form."""

    places: Annotated[tuple[Path, ...], tyro.conf.Positional]
    size: Heads = 2
    mode: Literal["fast", "slow"] | None = None
    share: bool | None = None
    note: Annotated[tuple[Line, ...], tyro.conf.UseAppendAction] = ()
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(warm=True))
    named: dict[str, Inner] = dataclasses.field(default_factory=lambda: {"a+b/c_d": Inner()})


SET = {
    "nothing": ("x", {}),
    "several places": ("x y/z", {"places": (Path("x"), Path("y/z"))}),
    "a value": ("x --size 3", {"size": 3}),
    "an equals sign": ("x --size=3", {"size": 3}),
    "the last of two": ("x --size 3 --size=4", {"size": 4}),
    "a choice": ("--mode slow x", {"mode": "slow"}),
    "none": ("x --mode None --inner.num-heads None", {"mode": None, "inner": Inner(num_heads=None)}),
    "none of a text": ("x --inner.only None", {"inner": Inner(only=None)}),
    "yes, no or none": ("x --share False", {"share": False}),
    "several times": ("x --note a=b --note=-c", {"note": ("a=b", "-c")}),
    "a dash before a value": ("x --note -c", {"note": ("-c",)}),
    "below": ("x --inner.rate 1e-1 --inner.num_heads 8", {"inner": Inner(rate=0.1, num_heads=8)}),
    "a switch": ("x --inner.warm --parts.1.no-warm", {"inner": Inner(warm=True), "parts": (Inner(), Inner())}),
    "in a mapping": ("x --named.a+b/c-d.num-heads 1", {"named": {"a+b/c_d": Inner(num_heads=1)}}),
}


@pytest.mark.parametrize(("words", "fields"), SET.values(), ids=SET)
def test_words_set_fields(words, fields):
    assert parse(Args, words.split(), prog="p") == Args(**{"places": (Path("x"),), **fields})


def test_words_change_a_default_and_begin_with_a_prefix():
    before = Inner(rate=0.25)
    assert parse(Inner, ["--a.num-heads", "2"], default=before, prefix="a.", prog="p") == Inner(rate=0.25, num_heads=2)
    assert parse(Inner, [], default=before, prog="p") is before


WRONG = {
    "unknown": ("x --siez 3", "'--siez' is not an option of 'p'; did you mean --size?"),
    "without its path": (
        "x --rate 1",
        "'--rate' is not an option of 'p'; did you mean --inner.rate or --parts.0.rate or --parts.1.rate?",
    ),
    "initials": (
        "x --nh 3",
        "'--nh' is not an option of 'p'; did you mean --inner.num-heads or --parts.0.num-heads or --parts.1.num-heads?",
    ),
    "a part of a name": (
        "x --heads 3",
        "'--heads' is not an option of 'p'; did you mean --inner.num-heads or --parts.0.num-heads",
    ),
    "another name of a part's": ("x --inner.nh 3", "'--inner.nh' is not an option of 'p'; did you mean --inner.num-heads?"),
    "far from all": ("x --qqqq 1", "'--qqqq' is not an option of 'p'; 'p --help' lists them"),
    "no value": ("x --size", "size has no value; write one after --size, or --size=VALUE"),
    "a flag for a value": ("x --size --mode slow", "size has no value; write one after --size, or --size=VALUE"),
    "text for a number": ("x --size many", "size='many' must be a whole number from 1 to 4096; use 2"),
    "a fraction": ("x --size 1.5", "size='1.5' must be a whole number from 1 to 4096; use 2"),
    "digits that are none": ("x --size \u0663", "size='\u0663' must be a whole number from 1 to 4096; use 2"),
    "many digits": ("x --size " + "9" * 5000, f"size='{'9' * 59}... must be a whole number from 1 to 4096; use 2"),
    "out of the domain": ("x --size 5000", "size=5000 must be a whole number from 1 to 4096; use 2"),
    "text for a fraction": ("x --inner.rate half", "inner.rate='half' must be a finite number above 0 and at most 1; use 0.5"),
    "no choice": ("x --mode fsat", "mode='fsat' must be one of fast, slow or None; did you mean 'fast'?"),
    "a switch with a value": (
        "x --inner.warm False",
        "inner.warm='False' is a switch and takes no value; use --inner.warm or --inner.no-warm",
    ),
    "a switch with an equals sign": (
        "x --inner.warm=1",
        "inner.warm='1' is a switch and takes no value; use --inner.warm or --inner.no-warm",
    ),
    "neither": ("x --share maybe", "share='maybe' must be True or False or None; use None to leave it out"),
    "missing": ("--size 3", "places is missing; write it after 'p'"),
    "an empty path": ("", "places='' must be a path; use another"),
    "a blank note": ("x --note=", "note.0='' must be"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_word_is_one_line(words, message):
    with pytest.raises(ValueError) as error:
        parse(Args, words.split(" "), prog="p")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


COMMANDS = {
    "train": "train lm_tiny {}",
    "plan": "plan lm_tiny --target cpu:8 {}",
    "eval": "eval run {}",
    "generate": "generate run {}",
    "report": "report run {}",
    "write-launch": "write-launch slurm lm_tiny --target h100:2x8 --run-folder /runs/a {}",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("wrong", ["--oot x", "--out", "--steps=1e3", "--step --seed"])
def test_every_command_answers_with_one_line_and_status_2(command, wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.format(wrong).split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and ";" in printed.err and not printed.out
    assert not any(tmp_path.iterdir())


def test_version_and_the_help_of_train_need_no_preset(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("plait ")
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert "--optimizer.learning-rate" in capsys.readouterr().out

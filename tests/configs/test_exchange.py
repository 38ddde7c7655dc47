"""Components exchanged by name, whatever holds them."""

from __future__ import annotations

import pytest

from plait.configs.command_line.exchange import component_flags, exchanged, offers, take
from plait.configs.components import unchecked
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gla import GLAConfig
from plait.tests.configs.gadgets.deeper.winch import WinchConfig
from plait.tests.configs.gadgets.lever import LeverConfig, LongLeverConfig

LEVER, LONG = LeverConfig(size=2, arm=5.0), LongLeverConfig(size=3)
WINCH = WinchConfig(main=LEVER, parts=(LEVER, LONG), both=(LEVER, SoftmaxConfig()), named={"a_b/c": LEVER}, anything=LEVER)
EXCHANGED = {
    "by the base of the kind": ("--main winch", lambda new: new.main == WinchConfig(size=2)),
    "by a class under its own, which has a default of its own": (
        "--exact long_lever",
        lambda new: new.exact == LongLeverConfig(arm=3.0),
    ),
    "none before": ("--spare lever", lambda new: new.spare == LeverConfig()),
    "in a tuple": ("--parts.1 winch", lambda new: new.parts == (LEVER, WinchConfig(size=3))),
    "in a tuple of two kinds": ("--both.1=gla", lambda new: new.both == (LEVER, GLAConfig())),
    "in a mapping, with dashes": ("--named.a-b/c winch", lambda new: new.named == {"a_b/c": WinchConfig(size=2)}),
    "in anything": ("--anything winch", lambda new: new.anything == WinchConfig(size=2)),
    "in what was exchanged": ("--main.main winch --main winch", lambda new: new.main.main == WinchConfig(size=1)),
    "by the same": ("--main lever", lambda new: new.main == LEVER),
}


@pytest.mark.parametrize(("words", "holds"), EXCHANGED.values(), ids=EXCHANGED)
def test_exchanged_whatever_holds_it(words, holds):
    rest = [*words.split(), "--size", "4"]
    with unchecked():
        new = exchanged(WINCH, rest)
    assert holds(new) and rest == ["--size", "4"]


def test_a_component_may_be_taken_out_where_none_may_be():
    filled = WinchConfig(spare=LEVER)
    with unchecked():
        assert exchanged(filled, ["--spare", "None"]).spare is None
        with pytest.raises(ValueError, match=r"^main='None': gadget 'None' is not registered"):
            exchanged(filled, ["--main", "None"])


def test_nothing_named_is_the_same_object():
    words = ["--size", "4"]
    assert exchanged(WINCH, words) is WINCH and words == ["--size", "4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--exact winch", r"^exact='winch' must be a LeverConfig; name one of those"),
        ("--main gla", r"^main='gla': gadget 'gla' is not registered"),
        ("--both.1 lever", r"^both\.1='lever': mixer 'lever' is not registered"),
        ("--main", r"^main has no value; write one after --main"),
        ("--main --spare lever", r"^main has no value"),
    ],
)
def test_what_cannot_stand_there_is_named(words, message):
    with pytest.raises(ValueError, match=message), unchecked():
        exchanged(WINCH, words.split())


def test_offers_are_places_and_names_by_kind():
    gadgets, mixers, *_ = offers(component_flags(WINCH)).split("\n\n")
    assert gadgets == "--main, --exact, --parts.0, --parts.1, --both.0, --named.a-b/c, --anything: lever, long_lever, winch"
    assert mixers.startswith("--both.1: aaren, ") and ", gated_deltanet, gated_deltaproduct, gla, " in mixers


@pytest.mark.parametrize(
    ("words", "value", "rest"),
    [
        ("--a.b-c 1 --x 2", "1", "--x 2"),
        ("--a.b_c=1 --x --a.b-c 3", "3", "--x"),
        ("--a.b-c 3 --a.b_c=1=2", "1=2", ""),
        ("--a.b-c.d 3 a.b-c 4 --a.b", None, "--a.b-c.d 3 a.b-c 4 --a.b"),
        ("--a.b-c=", "", ""),
    ],
)
def test_take(words, value, rest):
    left = words.split()
    assert take("a.b_c", left) == value and left == rest.split()

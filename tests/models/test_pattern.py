"""Layer patterns: what they expand to and what they refuse."""

import pytest

from plait.models.pattern import PatternError, expand_pattern, find_periods, pattern_names, split_name


@pytest.mark.parametrize(
    ("pattern", "num_layers", "layers"),
    [
        ("gla", 3, "gla gla gla"),
        ("gla*3,softmax", 4, "gla gla gla softmax"),
        ("gla*3,softmax", 6, "gla gla gla softmax gla gla"),
        (" gla * 2 , softmax ", 3, "gla gla softmax"),
        ("gla:softmax=2:1", 6, "gla gla softmax gla gla softmax"),
        ("a:b:c=1:2:1", 4, "a b b c"),
        ("softmax@0,3; gla", 5, "softmax gla gla softmax gla"),
        ("softmax@1;gla@0,2", 3, "gla softmax gla"),
        ("moh+softmax,softmax/local*2", 3, "moh+softmax softmax/local softmax/local"),
        ("softmax@0;moh+softmax/wide", 2, "softmax moh+softmax/wide"),
    ],
)
def test_pattern_expands(pattern, num_layers, layers):
    assert expand_pattern(pattern, num_layers) == tuple(layers.split())
    assert pattern_names(pattern) == tuple(dict.fromkeys(pattern_names(pattern)))
    assert set(pattern_names(pattern)) == set(layers.split())


@pytest.mark.parametrize(
    ("pattern", "num_layers", "message"),
    [
        ("", 2, "is empty; it name"),
        ("gla*3,softmax", 3, "has 4 layers; it must fit in num_layers=3"),
        ("gla*0", 2, "repeats 'gla' '0' times; it needs a positive count"),
        ("gla*x", 2, "repeats 'gla' 'x' times"),
        ("gla,,softmax", 4, "has ''; it needs names like"),
        ("GLA", 2, "has 'GLA'; it needs names like"),
        ("moh+moh+softmax", 2, r"has 'moh\+moh\+softmax'"),
        ("softmax/a/b", 2, "has 'softmax/a/b'"),
        ("gla:softmax=1", 4, "is not a ratio; it needs as many positive counts"),
        ("gla:softmax=1:0", 4, "is not a ratio"),
        ("gla:softmax=a:b", 4, "is not a ratio"),
        ("gla;softmax", 2, "gives both 'gla' and 'softmax' without layers"),
        ("gla@2;softmax", 2, "puts 'gla' at layer '2'; it needs layer numbers from 0 to 1"),
        ("gla@x;softmax", 2, "puts 'gla' at layer 'x'"),
        ("gla@0;softmax@0", 1, "gives layer 0 twice"),
        ("gla@0,2", 4, "leaves layers 1, 3 of 4 empty; it needs a mixer without '@'"),
    ],
)
def test_wrong_pattern_names_itself_the_rule_and_the_fix(pattern, num_layers, message):
    with pytest.raises(PatternError, match=message) as error:
        expand_pattern(pattern, num_layers)
    assert str(error.value).startswith(f"pattern={pattern!r} ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gla", (None, "gla")),
        ("moh+softmax", ("moh", "softmax")),
        ("softmax/local", (None, "softmax")),
        ("moh+gla/a", ("moh", "gla")),
    ],
)
def test_name_splits(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("layers", "period"),
    [
        ("aaaa", (1, 4)),
        ("abab", (2, 2)),
        ("aabaab", (3, 2)),
        ("dabab", (1, 2, 2)),
        ("daabaaba", (1, 3, 2)),
        ("dcaaaab", (2, 1, 4)),
        ("ababa", (2, 2)),
        ("aaabaaabaa", (4, 2)),
        ("abc", (3, 1)),
        ("a", (1, 1)),
    ],
)
def test_period_is_the_shortest_that_repeats(layers, period):
    leads = len(period) == 3
    assert find_periods(tuple(layers), behind_others=leads) == (period if leads else (0, *period))


@pytest.mark.parametrize("pattern", ["gla*²", "gla*99999999999", "gla:softmax=²:1"])
def test_counts_that_are_no_counts_of_layers_are_refused(pattern):
    with pytest.raises(PatternError, match="count"):
        expand_pattern(pattern, 4)

"""ListOps against a reader of expressions and against the published generator, as the paper's code has it."""

import itertools
import random
import statistics

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.listops import ASK, ListOpsTask, share_of_lengths

NAMES = [*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]", "="]
REDUCE = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
CASES = {
    "default": (ListOpsTask(), 512),
    "published": (ListOpsTask(min_length=500, max_length=2000), 2048),
    "flat": (ListOpsTask(max_depth=2, max_args=5, min_length=1, max_length=8), 8),
    "deep": (ListOpsTask(max_depth=20, max_args=3, min_length=20, max_length=60), 60),
}


def read(words):
    """Value, depth and lists of an expression, `(operator, arguments)` each, by a stack."""
    stack, lists, depth = [[]], [], 0
    for word in words:
        if word == "]":
            operator, *values = stack.pop()
            lists.append((operator, values))
            stack[-1].append(REDUCE[operator](values))
        elif word in REDUCE:
            stack.append([word])
        else:
            stack[-1].append(int(word))
            depth = max(depth, len(stack))
    ((value,),) = stack
    return value, depth, lists


def rows(task, seq_len, count):
    """Expressions as words, and their answers."""
    tokens, targets = task.generate(Draws(np.arange(count), "test"), seq_len)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        length = row.index(ASK) if ASK in row else len(row)
        assert set(row[length:]) <= {ASK}
        (place,) = [at for at, target in enumerate(asked) if target != NOT_ASKED]
        assert place == length
        yield [NAMES[token] for token in row[:length]], asked[place]


@pytest.mark.parametrize(("task", "seq_len"), CASES.values(), ids=CASES)
def test_answers_are_the_values_of_the_expressions(task, seq_len):
    seen = set()
    for words, answer in rows(task, seq_len, 64):
        value, depth, lists = read(words)
        assert value == answer
        assert task.min_length < len(words) < task.max_length and 2 <= depth <= task.max_depth
        assert all(2 <= len(values) <= task.max_args for _, values in lists)
        seen.add(tuple(words))
    assert len(seen) > 60


def test_an_expression_worked_by_hand():
    """The reader that the other tests rest on."""
    text = "[MAX 2 9 [MIN 4 7 ] 0 [MED 1 4 4 8 6 2 ] [SM 9 9 5 ] ]"
    value, depth, lists = read(text.split())
    assert (value, depth) == (9, 3)
    assert [(name, REDUCE[name](values)) for name, values in lists] == [("[MIN", 4), ("[MED", 4), ("[SM", 3), ("[MAX", 9)]
    assert read(["[MED", *"1458", "]"])[0] == 4, "the median is cut to a whole number"


def tree(task, depth, rng):
    """An expression made by the steps of the authors' generator."""
    if (rng.random() if depth < task.max_depth else 1) > 0.25:
        return [str(rng.choice(range(10)))]
    arguments = [tree(task, depth + 1, rng) for _ in range(rng.randint(2, task.max_args))]
    return [rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *itertools.chain(*arguments), "]"]


def published(task, count, rng):
    """Expressions of the lengths asked for."""
    while count:
        words = tree(task, 1, rng)
        if task.min_length < len(words) < task.max_length:
            count -= 1
            yield words


def facts(words):
    """What is compared of one expression."""
    value, depth, lists = read(words)
    operators = [sum(name == one for name, _ in lists) for one in REDUCE]
    return [
        *(value == one for one in range(10)),
        *(words[0] == one for one in REDUCE),
        len(words),
        depth,
        *operators,
        len(lists[-1][1]),
        sum(len(values) == 2 for _, values in lists),
        words.count("7"),
    ]


def test_distribution_is_the_published_one():
    """Answers, roots, lengths, depths and operators: means within five standard deviations of each other."""
    task, count = ListOpsTask(max_depth=5, max_args=6, min_length=12, max_length=60), 3000
    ours = np.asarray([facts(words) for words, _ in rows(task, 60, count)], float)
    want = np.asarray([facts(words) for words in published(task, count, random.Random(0))], float)
    spread = np.sqrt((ours.var(0) + want.var(0)) / count)
    np.testing.assert_array_less(np.abs(ours.mean(0) - want.mean(0)), 5 * spread)


@pytest.mark.parametrize(
    "task", [ListOpsTask(max_depth=3, max_args=3, max_length=20, min_length=5), ListOpsTask()], ids=["small", ""]
)
def test_share_of_the_lengths_is_that_of_the_trees(task):
    """Of our trees, and of the published ones that are lists."""
    rng, count = random.Random(0), 20_000 if task.max_depth < 5 else 1000
    _, lengths = task._grow(np.arange(count, dtype=np.uint64))
    found = [words for words in (tree(task, 1, rng) for _ in range(4 * count)) if len(words) > 1]
    want = share_of_lengths(task.max_depth, task.max_args, task.min_length, task.max_length)
    for theirs in (lengths, np.asarray([len(words) for words in found])):
        share = ((theirs > task.min_length) & (theirs < task.max_length)).mean()
        assert abs(share - want) < 5 * np.sqrt(want * (1 - want) / len(theirs))
    assert want > 0.05


@pytest.mark.parametrize(
    ("fields", "seq_len", "message"),
    [
        ({}, 499, r"data\.task\.max_length=500 must be at most data\.seq_len=499; use 499 or less, or data\.seq_len=500 or more"),
        ({"max_depth": 1}, 512, r"listops\.max_depth=1 must be a whole number from 2"),
        ({"max_args": 1}, 512, r"listops\.max_args=1 must be a whole number from 2"),
        ({"min_length": 0}, 512, r"listops\.min_length=0 must be a whole number from 1"),
        ({"min_length": 600}, 512, r"min_length=600 and max_length=500 must hold at least 0.01 of the expressions"),
        (
            {"max_depth": 2},
            512,
            r"min_length=100 and max_length=500 must .* of max_depth=2 and max_args=10, not 0.0000; use lengths further apart or shorter",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=ListOpsTask(**fields), seq_len=seq_len)

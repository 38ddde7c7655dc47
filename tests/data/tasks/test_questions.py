"""Tasks of a question and its answers: where answers are asked, rows worked by hand, published laws, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.tasks.addition import AdditionTask
from plait.data.tasks.base import TASKS
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.histogram import HistogramTask
from plait.data.tasks.multiplication import MultiplicationTask
from plait.data.tasks.permutation import PermutationTask
from plait.data.tasks.prefix_sum import PrefixSumTask
from plait.data.tasks.questions import QuestionTask
from plait.data.tasks.repeat import RepeatTask
from plait.data.tasks.reverse import ReverseTask

QUESTIONS = [name for name, task in TASKS.all().items() if issubclass(task, QuestionTask)]
ROWS = 20_000


def rows(task, count=20, more=0):
    """Rows of just the tokens that the task needs, or some more: lists of tokens and targets."""
    length = task.num_tokens(getattr(task, task.size)) + more
    return [x.tolist() for x in task.generate(Draws(np.arange(count), "test"), length)]


def told(tokens, targets):
    """A row as it was drawn: question and answers."""
    first = next(i for i, target in enumerate(targets) if target != NOT_ASKED) + 1
    return tokens[:first], [target for target in targets if target != NOT_ASKED]


def by_hand(name, question):
    """The answers to a question in a task's default form."""
    if name == "moving_window":
        return [question[0], *((one + two) % 17 for one, two in itertools.pairwise(question[:-1]))]
    if name == "prefix_sum":
        return [sum(question[: i + 1]) % 17 for i in range(len(question) - 1)]
    if name == "reverse":
        return [*reversed(question[:-1])]
    if name == "repeat":
        return [question[0]] * (len(question) - 1)
    if name == "histogram":
        return [question[:-1].count(symbol) for symbol in question[:-1]]
    if name == "permutation":
        n = question.index(0)
        return [question[place - 1] for place in question[n + 1 : 2 * n + 1]]
    assert question[-1] == 11
    sign = question.index(10)
    parts = ["".join(map(str, part)) for part in (question[:sign], question[sign + 1 : -1])]
    if name == "addition":
        return [int(digit) for digit in reversed(str(int(parts[0]) + int(parts[1])).zfill(sign + 1))]
    assert name == "multiplication"
    return [int(digit) for digit in reversed(str(int(parts[0][::-1]) * int(parts[1][::-1])).zfill(2 * sign))]


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_follow_from_the_question_and_stand_behind_it(name, more):
    for tokens, targets in zip(*rows(TASKS[name](), more=more), strict=True):
        question, answers = told(tokens, targets)
        assert answers == by_hand(name, question)
        last = len(question) + len(answers) - 1
        assert tokens == [*question, *answers[:-1], *[question[-1]] * (len(tokens) - last)]
        assert targets == [*[NOT_ASKED] * (len(question) - 1), *answers, *[NOT_ASKED] * more]


WORKED = {
    "blocks go on modulo 17": (RepeatTask(length=4, num_blocks=4), lambda q: [(q[0] + i) % 17 for i in range(4)]),
    "two blocks": (RepeatTask(length=6, num_blocks=2), lambda q: [q[0]] * 3 + [(q[0] + 1) % 17] * 3),
    "the square of a permutation": (PermutationTask(length=5, power=2), lambda q: [q[q[6:][p - 1] - 1] for p in q[6:11]]),
    "its cube": (PermutationTask(length=5, power=3), lambda q: [q[q[6:][q[6:][p - 1] - 1] - 1] for p in q[6:11]]),
    "a sum from its first digit": (AdditionTask(order="most"), lambda q: [*reversed(by_hand("addition", q))]),
}


@pytest.mark.parametrize(("task", "answers"), WORKED.values(), ids=WORKED)
def test_other_forms_by_hand(task, answers):
    for tokens, targets in zip(*rows(task), strict=True):
        question, found = told(tokens, targets)
        assert found == answers(question)


def assert_law(found, law):
    """Shares of 0, 1, ..., within five standard deviations of a law."""
    found = np.asarray(found)
    shares = np.bincount(found.ravel(), minlength=len(law)) / found.size
    np.testing.assert_allclose(shares, law, atol=5 * np.sqrt(max(law) / len(found)))


def test_prefix_sums_are_as_likely_as_published_numbers_make_them():
    """The first is never 0, and from the second on each is as likely as another, but for 1 in 16 of the rest before it."""
    tokens, targets = PrefixSumTask().generate(Draws(np.arange(ROWS), "test"), 32)
    law = np.r_[0, np.full(16, 1 / 16)]
    for place in range(3):
        assert_law(targets[:, 16 + place], law)
        law = np.array([sum(law[(s - x) % 17] for x in range(1, 17)) / 16 for s in range(17)])
    assert_law(tokens[:, :16], np.r_[0, np.full(16, 1 / 16)])


def test_counts_are_one_more_than_those_among_the_others():
    """So always telling the likeliest count, 2, is right in 37% of cases: binomial of 15 symbols that are this one in 1 of 12."""
    _, targets = HistogramTask().generate(Draws(np.arange(ROWS), "test"), 32)
    law = [0, *(math.comb(15, k) * (1 / 12) ** k * (11 / 12) ** (15 - k) for k in range(16))]
    assert_law(targets[:, 16], law)
    assert law.index(max(law)) == 2 and round(max(law), 2) == 0.37


def test_permutations_and_their_strings_are_any():
    tokens, _ = PermutationTask(length=3, num_symbols=2).generate(Draws(np.arange(ROWS), "test"), 10)
    orders = {order: i for i, order in enumerate(itertools.permutations((1, 2, 3)))}
    assert_law([orders[tuple(row)] for row in tokens[:, 4:7].tolist()], [1 / 6] * 6)
    assert_law(tokens[:, :3] - 4, [0.5, 0.5])


def test_numbers_to_add_are_any_but_zero():
    tokens, _ = AdditionTask(num_digits=1).generate(Draws(np.arange(ROWS), "test"), 5)
    for place in (0, 2):
        assert_law(tokens[:, place], [0, *[1 / 9] * 9])


def test_whole_is_of_rows_that_are_right_throughout():
    mask = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 0]], np.float32)
    batch = Batch(mask, mask, mask, mask, mask)
    right = np.array([[False, True, True], [False, True, False], [False, False, False]])
    assert ReverseTask().scores(batch, mask, right) == {"accuracy": (3.0, 4.0), "whole": (1.0, 2.0)}


REFUSED = {
    "no row": (
        ReverseTask(length=9),
        16,
        r"data\.task\.length=9 needs rows of at least 18 tokens, not data\.seq_len=16; use 8 or less",
    ),
    "a row of one token": (
        PrefixSumTask(),
        1,
        r"data\.task\.length=16 needs rows of at least 32 tokens, .*; use data\.seq_len=32 or more",
    ),
    "three parts": (PermutationTask(), 48, r"length=16 needs rows of at least 49 tokens, not data\.seq_len=48; use 15 or less"),
    "digits": (AdditionTask(), 13, r"num_digits=4 needs rows of at least 14 tokens, not data\.seq_len=13; use 3 or less"),
    "steps": (MultiplicationTask(steps="written"), 63, r"num_digits=4 needs rows of at least 64 tokens, .*; use 3 or less"),
}


@pytest.mark.parametrize(("task", "seq_len", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(task, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=task, seq_len=seq_len)


def test_blocks_divide_the_answers():
    with pytest.raises(ValueError, match=r"repeat\.num_blocks=3 must divide length=16; use one of 1, 2, 4, 8, 16"):
        RepeatTask(num_blocks=3)

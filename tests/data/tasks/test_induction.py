"""Induction: rows read by hand, the law of the distance, and what is refused."""

import math

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.induction import InductionTask
from plait.data.tasks.induction_copy import InductionCopyTask


@pytest.mark.parametrize(("vocab_size", "seq_len"), [(16, 256), (3, 4), (20, 31)])
def test_what_followed_the_special_token_is_asked_at_the_end(vocab_size, seq_len):
    for row, asked in zip(
        *(x.tolist() for x in InductionTask(vocab_size=vocab_size).generate(Draws(np.arange(50), "test"), seq_len))
    ):
        special = vocab_size - 1
        first = row.index(special)
        assert row.count(special) == 2 and row[-1] == special and first <= seq_len - 4
        assert asked == [*[NOT_ASKED] * (seq_len - 1), row[first + 1]]
        assert min(row) >= 0


def test_distances_and_answers_are_any():
    """As in the authors' generator: the first of N random tokens and the special one at any of N - 2 places, the answer any of V - 1."""
    count, n = 20_000, 9
    tokens, targets = InductionTask(vocab_size=5).generate(Draws(np.arange(count), "test"), n + 1)
    places = np.bincount((tokens == 4).argmax(1), minlength=n - 2) / count
    np.testing.assert_allclose(places, 1 / (n - 2), atol=5 * math.sqrt(1 / (n - 2) / count))
    np.testing.assert_allclose(np.bincount(targets[:, -1]) / count, 1 / 4, atol=5 * math.sqrt(1 / 4 / count))


@pytest.mark.parametrize(("vocab_size", "seq_len"), [(51, 101), (8, 16), (3, 5)])
def test_different_tokens_come_twice_and_are_asked_the_second_time(vocab_size, seq_len):
    length, start = (seq_len - 1) // 2, vocab_size - 1
    for row, asked in zip(
        *(x.tolist() for x in InductionCopyTask(vocab_size=vocab_size).generate(Draws(np.arange(20), "test"), seq_len))
    ):
        first = row[1 : length + 1]
        assert len(set(first)) == length and start not in first and min(first) >= 0
        assert row == [start, *first, *first, *[start] * (seq_len - 2 * length - 1)]
        assert asked == [*[NOT_ASKED] * (length + 1), *first[1:], *[NOT_ASKED] * (seq_len - 2 * length)]


@pytest.mark.parametrize(
    ("task", "seq_len", "message"),
    [
        (
            InductionTask(),
            3,
            r"data\.task\.vocab_size=16 needs rows .* of 4 tokens or more, not data\.seq_len=3; use data\.seq_len=4",
        ),
        (InductionCopyTask(), 4, r"vocab_size=1024 needs rows .* of 5 tokens or more, not data\.seq_len=4; use data\.seq_len=5"),
        (
            InductionCopyTask(vocab_size=16),
            33,
            r"vocab_size=16 must be above the 16 different tokens .* use 17 or more, or data\.seq_len=32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(task, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=task, seq_len=seq_len)
    assert DataConfig(task=InductionCopyTask(vocab_size=16), seq_len=32)

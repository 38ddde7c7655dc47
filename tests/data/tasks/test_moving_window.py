"""Moving-window sums: each row is summed by hand, and numbers and sums are as likely as published."""

import itertools

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.moving_window import MovingWindowTask


@pytest.mark.parametrize(("length", "seq_len"), [(16, 32), (16, 40), (1, 2), (5, 11)])
def test_sums_are_asked_where_the_one_before_stands(length, seq_len):
    for row, asked in zip(*(x.tolist() for x in MovingWindowTask(length=length).generate(Draws(np.arange(20), "test"), seq_len))):
        numbers = row[:length]
        assert all(1 <= x <= 16 for x in numbers)
        sums = [numbers[0], *((one + two) % 17 for one, two in itertools.pairwise(numbers))]
        rest = seq_len - 2 * length
        assert row == [*numbers, 17, *sums[:-1], *[17] * rest]
        assert asked == [*[NOT_ASKED] * length, *sums, *[NOT_ASKED] * rest]


def test_numbers_are_uniform():
    """So a sum is 0 in 16 of 256 cases, and each other residue in 15: what a model gains that only knows their law."""
    tokens, targets = MovingWindowTask().generate(Draws(np.arange(20_000), "test"), 32)
    for found, law in ((tokens[:, :16], [0, *[1 / 16] * 16]), (targets[:, 17:], [16 / 256, *[15 / 256] * 16])):
        shares = np.bincount(found.ravel(), minlength=17) / found.size
        np.testing.assert_allclose(shares, law, atol=5 * np.sqrt(2 / 16 / found.size))


def test_more_than_half_a_row_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.task\.length=9 needs rows of at least 18 tokens, not data\.seq_len=16; use 8 or less"
    ):
        DataConfig(task=MovingWindowTask(length=9), seq_len=16)

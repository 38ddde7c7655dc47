"""Selective copying: rows read by hand, and places and symbols as the published generator draws them."""

import itertools
import math

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.selective_copy import SelectiveCopyTask


@pytest.mark.parametrize(
    ("fields", "seq_len"), [({}, 4128), ({"num_data": 3}, 12), ({"num_data": 2, "vocab_size": 4}, 4)], ids=str
)
def test_what_is_no_noise_is_told_in_its_order(fields, seq_len):
    task = SelectiveCopyTask(**fields)
    m, marker = task.num_data, task.vocab_size - 1
    for row, asked in zip(*(x.tolist() for x in task.generate(Draws(np.arange(20), "test"), seq_len))):
        body = row[: seq_len - m]
        data = [token for token in body if token != 0]
        assert len(data) == m and all(1 <= token < marker for token in data)
        assert row == [*body, *[marker] * m]
        assert asked == [*[NOT_ASKED] * len(body), *data]


def test_places_and_symbols_are_any():
    """Each set of places is as likely as another, so the gap before the first of m among n places is j in C(n - 1 - j, m - 1) / C(n, m)."""
    count, n, m = 20_000, 6, 2
    tokens, targets = SelectiveCopyTask(num_data=m, vocab_size=5).generate(Draws(np.arange(count), "test"), n + m)
    sets = {places: i for i, places in enumerate(itertools.combinations(range(n), m))}
    found = [sets[tuple(np.flatnonzero(row).tolist())] for row in tokens[:, :n]]
    shares = np.bincount(found, minlength=len(sets)) / count
    np.testing.assert_allclose(shares, 1 / len(sets), atol=5 * math.sqrt(1 / len(sets) / count))
    gaps = np.bincount((tokens[:, :n] > 0).argmax(1), minlength=n - 1) / count
    law = [math.comb(n - 1 - j, m - 1) / math.comb(n, m) for j in range(n - 1)]
    np.testing.assert_allclose(gaps, law, atol=5 * math.sqrt(1 / 3 / count))
    told = np.bincount((targets[:, n:] @ [3, 1]) - 4, minlength=9) / count  # both together
    np.testing.assert_allclose(told, 1 / 9, atol=5 * math.sqrt(1 / 9 / count))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"data\.task\.num_data=9 must be at most half of data\.seq_len=16, .* use 8 or less"):
        DataConfig(task=SelectiveCopyTask(num_data=9), seq_len=16)
    with pytest.raises(ValueError, match=r"num_data=16 .* use data\.seq_len=32 or more"):
        DataConfig(task=SelectiveCopyTask(), seq_len=1)
    with pytest.raises(ValueError, match=r"selective_copy\.vocab_size=3 must be a whole number from 4"):
        SelectiveCopyTask(vocab_size=3)

"""Random numbers of rows: their distributions, and that they belong to the row."""

import itertools
import math

import numpy as np
import pytest

from plait.data.tasks.draws import Draws

ROWS = 40_000


def draws(rows=ROWS, salt="test"):
    return Draws(np.arange(rows), salt)


def assert_shares(found, expected):
    """Counts of outcomes in `ROWS` draws, each within five standard deviations."""
    for outcome, p in expected.items():
        assert abs(found.get(outcome, 0) / ROWS - p) < 5 * math.sqrt(p * (1 - p) / ROWS), outcome
    assert sum(found.values()) == ROWS


def counted(rows):
    values, counts = np.unique(rows, axis=0, return_counts=True)
    return {tuple(value.tolist()): int(count) for value, count in zip(values, counts)}


def test_numbers_never_change():
    """A resumed run, on any machine and with any NumPy, reads the rows that it would have read."""
    one = Draws(np.array([0, 5]), "task", 0, "train")
    found = [one.integers(1000, 3).tolist(), one.distinct(10, 4).tolist(), one.distinct_by_weight(np.arange(1.0, 6), 3).tolist()]
    assert found == [[[132, 508, 408], [826, 585, 901]], [[5, 8, 2, 9], [5, 8, 6, 4]], [[2, 4, 3], [2, 1, 3]]]


def test_a_rows_numbers_are_its_own():
    whole, some = draws(50), Draws(np.array([3, 7, 49]), "test")
    for read in (lambda d: d.uniform(5), lambda d: d.distinct(9, 4), lambda d: d.distinct_by_weight(np.ones(6), 2)):
        np.testing.assert_array_equal(read(whole)[[3, 7, 49]], read(some))


def test_rows_salts_and_calls_differ():
    one = draws(100)
    first, second = one.uniform(4), one.uniform(4)
    assert len(np.unique(np.stack([first, second, draws(100, "other").uniform(4)]))) == 1200


def test_uniform_is_uniform():
    found = draws().uniform(2)
    assert found.min() >= 0 and found.max() < 1
    assert_shares(counted((found * 4).astype(int)), dict.fromkeys(itertools.product(range(4), range(4)), 1 / 16))


def test_normal_is_normal():
    """Shares beyond points of both tails, of pairs that know nothing of each other."""
    found = draws().normal(2)
    for bound, share in ((-1.0, 0.1586553), (0.0, 0.5), (2.0, 0.9772499)):
        assert np.abs((found < bound).mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / ROWS)
    assert abs(np.corrcoef(found.T)[0, 1]) < 5 / math.sqrt(ROWS) and np.isfinite(found).all()


def test_integers_cover_their_range():
    assert_shares(counted(draws().integers(3, 1)), {(i,): 1 / 3 for i in range(3)})


@pytest.mark.parametrize(("stop", "count"), [(4, 2), (4, 4), (5, 1)])
def test_distinct_in_every_order(stop, count):
    found = draws().distinct(stop, count)
    orders = list(itertools.permutations(range(stop), count))
    assert_shares(counted(found), dict.fromkeys(orders, 1 / len(orders)))


def test_weights_decide_one_after_another():
    weights = np.array([1.0, 0.5, 0.25, 2.0])

    def chance(order):
        left, p = weights.sum(), 1.0
        for index in order:
            p, left = p * weights[index] / left, left - weights[index]
        return p

    found = draws().distinct_by_weight(weights, 3)
    assert_shares(counted(found), {order: chance(order) for order in itertools.permutations(range(4), 3)})

"""State tracking against the steps of the published generator: permutations as tuples, one product after another."""

import itertools

import numpy as np
import pytest

from plait.data.tasks.draws import Draws
from plait.data.tasks.state_tracking import StateTrackingTask, products

ORDERS = {"Z2": 2, "Z60": 60, "S3": 6, "A5": 60, "S5": 120}


def elements(group):
    """The elements in order, and their product."""
    kind, size = group[0], int(group[1:])
    if kind == "Z":
        return list(range(size)), lambda a, b: (a + b) % size
    even = lambda p: sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    every = [p for p in itertools.permutations(range(size)) if kind == "S" or even(p)]
    return every, lambda a, b: tuple(a[b[i]] for i in range(size))


@pytest.mark.parametrize("group", ORDERS)
def test_targets_are_the_running_products(group):
    every, product = elements(group)
    assert len(every) == ORDERS[group]
    tokens, targets = StateTrackingTask(group=group).generate(Draws(np.arange(8), "test"), 37)
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        state = every[0]
        for token, answer in zip(row, answers, strict=True):
            state = product(state, every[token])
            assert every[answer] == state


def test_a_row_worked_by_hand():
    """Of S3: 012, 021, 102, 120, 201, 210 are 0 to 5. 102 after 021 is 1->2, 2->1, then 0<->1: i goes to 021[102[i]] = 2, 0, 1."""
    table = products("S3")
    assert [table[1, 2], table[2, 1], table[4, 3], table[3, 3], table[5, 5]] == [4, 3, 0, 4, 0]
    parity, states = StateTrackingTask(group="Z2").generate(Draws(np.arange(1), "by hand"), 9)
    assert states[0].tolist() == (np.cumsum(parity[0]) % 2).tolist()


@pytest.mark.parametrize("group", ORDERS)
def test_table_is_that_of_a_group(group):
    table = products(group)
    every = np.arange(len(table))
    np.testing.assert_array_equal(table[0], every)
    np.testing.assert_array_equal(table[:, 0], every)
    for rows in (table, table.T):
        np.testing.assert_array_equal(np.sort(rows, axis=1), np.broadcast_to(every, table.shape))
    if len(table) <= 60:
        np.testing.assert_array_equal(table[table[:, :, None], every], table[every[:, None, None], table])
    assert (table == table.T).all() == (group[0] == "Z")


@pytest.mark.parametrize("group", ORDERS)
def test_elements_are_uniform_and_so_are_states(group):
    """At every place, so that nothing but the whole prefix says more than chance."""
    count, n = 6000, ORDERS[group]
    for ids in StateTrackingTask(group=group).generate(Draws(np.arange(count), "uniform"), 5):
        for column in ids.T:
            assert np.abs(np.bincount(column, minlength=n) / count - 1 / n).max() < 5 * np.sqrt(1 / n / count)

"""Every linear mixer costs time and memory in proportion to the length, and decodes with a state that the length does not change."""

import pytest

from plait.benchmarks.linear_time import linear_mixers, measure, slope

LENGTHS = (2048, 8192, 32768)


@pytest.mark.slow
@pytest.mark.parametrize("name", linear_mixers())
def test_costs_are_linear_in_the_length(name):
    costs = measure(linear_mixers()[name], LENGTHS, repeats=3)
    assert slope(LENGTHS, costs.temp_bytes) < 1.1
    assert slope(LENGTHS, costs.seconds) < 1.3  # a quadratic one has 2; a machine that does other things has noise
    assert len(set(costs.state_bytes)) == 1
    assert max(costs.decode_seconds) < 3 * min(costs.decode_seconds)

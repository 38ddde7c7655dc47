"""Every linear mixer needs memory in proportion to the length, and decodes with a state that the length does not change.

Times are measured by `benchmarks/linear_time.py`.
"""

import pytest

from plait.benchmarks.linear_time import Layer, linear_mixers, slope

LENGTHS = (2048, 8192, 32768)


@pytest.mark.slow
@pytest.mark.parametrize("name", linear_mixers())
def test_memory_is_linear_in_the_length(name):
    layer = Layer(linear_mixers()[name], max(LENGTHS))
    assert slope(LENGTHS, [layer.step(length)[1] for length in LENGTHS]) < 1.1
    assert len({layer.decoding(length)[1] for length in LENGTHS}) == 1

"""The median that is found without sorting is that of a sort."""

import numpy as np
import pytest

from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.train.probes.residual import absolute_median


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 127])
def test_median_is_that_of_a_sort(tokens):
    rng = np.random.default_rng(tokens)
    x = np.abs(rng.normal(size=(2, 128, 3)) * 10.0 ** rng.integers(-30, 30, (2, 128, 3))).astype(np.float32)
    x[:, ::3] = np.round(x[:, ::3])  # some zeros, some alike
    real = rng.permuted(np.arange(128)[None] < np.full((2, 1), tokens), axis=1)
    x[0, 8, 1] = np.nan
    sample = np.where(real[:, ::8, None], x[:, ::8], np.nan)
    expected = np.nanmedian(sample) if np.isfinite(sample).any() else 0.0
    assert_close(quick_jit(absolute_median)(x, real), expected)


def test_median_of_nothing_is_zero():
    assert quick_jit(absolute_median)(np.ones((1, 4, 2), np.float32), np.zeros((1, 4), bool)) == 0

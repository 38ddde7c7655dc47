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
    x[0, np.flatnonzero(real[0])[0], 1] = np.nan
    assert_close(quick_jit(absolute_median)(x, real), np.nanmedian(sample_of(x, real)))


def sample_of(x, real):
    """16 real tokens of each row, evenly spaced, or all."""
    rows = [row[own] for row, own in zip(x, real, strict=True)]
    return np.concatenate([row[np.arange(16) * len(row) // 16] if len(row) > 16 else row for row in rows])


@pytest.mark.parametrize(
    "places", [slice(1, 8), slice(121, 128), slice(9, 12)], ids=["before padding", "behind it", "in between"]
)
def test_short_documents_are_seen_wherever_they_stand(places):
    """Neither padding around them nor a row of it has a part: what lies there is 1000 times as large."""
    x = np.abs(np.random.default_rng(0).normal(size=(3, 128, 4))).astype(np.float32)
    real = np.zeros((3, 128), bool)
    real[:2, places] = True
    exact = np.median(x[real])
    assert_close(quick_jit(absolute_median)(np.where(real[..., None], x, 1000 * x), real), exact)


def test_full_rows_are_sampled_evenly():
    x = np.arange(256, dtype=np.float32).reshape(1, 256, 1) ** 2
    assert quick_jit(absolute_median)(x, np.ones((1, 256), bool)) == np.median(x[:, ::16])


def test_median_of_nothing_is_zero():
    assert quick_jit(absolute_median)(np.ones((1, 4, 2), np.float32), np.zeros((1, 4), bool)) == 0

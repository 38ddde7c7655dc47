"""Norms of values and of the residual stream by hand: document starts and padding are left out."""

import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure


def test_norms_by_hand():
    x = np.zeros((1, 6, 2))
    x[0, :, 0] = [50, 3, 5, 60, 7, 99]
    v = np.zeros((1, 6, 2, 1))
    v[0, :, 0, 0], v[0, :, 1, 0] = [9, -1, 2, 9, 3, 99], 4
    look = look_at(np.zeros((1, 4, 6, 6)), [[3, 2]], v=v, residual=x)
    assert_close(measure("residual", look)["residual_norm"], np.float32((3 + 5 + 7) / 3 / np.sqrt(2)))
    assert_close(measure("value_drain", look)["value_norm"], np.float32([2, 2, 4, 4]))

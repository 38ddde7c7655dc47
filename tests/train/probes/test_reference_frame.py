"""How many anchors attention has."""

import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense
from plait.tests.train.probes.test_probes import look_at, measure, on


def test_by_hand():
    """All on the first token, half on each end, each token on itself; a sequence that begins with less is left out."""
    ends = (on(64, *[0] * 64) + on(64, *[63] * 64)) / 2
    heads = np.concatenate([on(64, *[0] * 64), -3 * ends, on(64, *range(64))], 1)
    found = measure("reference_frame", look_at(np.concatenate([heads, heads[:, ::-1]]), [[64], [60]]))
    assert_close(found["anchors"], np.float32([1, 2, 64]))
    assert_close(found["anchor_share"], np.float32([1, 1 / 2, 1 / 64]))
    assert np.isnan(measure("reference_frame", look_at(heads, [[60]]))["anchors"]).all()
    assert measure("reference_frame", look_at(heads[:, :, :63, :63], [[63]])) == {}


def test_of_a_model():
    """Against attention in float64."""
    found, kept, _, at = dense.measured("reference_frame", (70,), (40, 30), (64, 3), length=72)
    received = dense.attention(kept, at)[0][[0, 2], :, :64, :64].sum(-2) / 64
    assert_close(found["anchors"], np.exp(-(received * np.log(received)).sum(-1)).mean(0))
    assert_close(found["anchor_share"], received.max(-1).mean(0))

"""How far back heads look."""

import numpy as np

from plait.configs.probe import ProbeConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense
from plait.tests.train.probes.test_probes import look_at, measure, on
from plait.train.probes.distance import RANGES


def test_by_hand():
    """Documents of four and two, then padding; one head looks one back, the other at the first token."""
    back, first = on(7, 0, 0, 1, 2, 4, 4, 0), on(7, 0, 0, 0, 0, 4, 4, 0)
    found = measure("distance", look_at(np.concatenate([back, -2 * first], 1), [[4, 2]]), ProbeConfig(far=2))
    assert_close(found["attention_distance"], np.float32([4 / 6, 7 / 6]))
    assert_close(found["offset_share"], np.float32([4 / 6, 2 / 6]))
    assert_close(found["offset"], np.float32([1, 0]))
    assert_close(found["far_share"], np.float32([0, 1]))
    lags, positions = np.asarray(found["lag_curve"]), np.asarray(found["primacy_curve"])
    assert lags.shape == (2, RANGES) and np.isnan(lags[:, 3:]).all() and np.isnan(positions[:, 3:]).all()
    assert_close(lags[:, :3], np.float32([[2 / 6, 4 / 4, 0], [2 / 6, 2 / 4, 2 / 3]]))  # of 6, 4 and 3 pairs
    assert_close(positions[:, :3], np.float32([[2 / 4, 1 / 2, 1 / 1], [4 / 4, 0, 0]]))


def test_without_far_tokens_there_is_no_share():
    found = measure("distance", look_at(on(4, 0, 0, 1, 2), [[4]]), ProbeConfig(far=4))
    assert np.isnan(found["far_share"]).all() and np.isfinite(found["attention_distance"]).all()


def test_of_a_model():
    """Against attention in float64."""
    found, kept, rows, at = dense.measured("distance", (25, 10), (20,), length=40, rows=8, far=6)
    a, _ = dense.attention(kept, at)
    seen, positions = dense.visible(at), np.asarray(at.positions)
    queries = [(b, t) for b in range(2) for t in rows if seen[b, t].any()]
    lag = np.subtract.outer(np.arange(40), np.arange(40))
    assert_close(found["attention_distance"], np.mean([(a[b, :, t] * lag[t]).sum(-1) for b, t in queries], 0))
    far = [(a[b, :, t] * (lag[t] >= 6)).sum(-1) for b, t in queries if positions[b, t] >= 6]
    assert_close(found["far_share"], np.mean(far, 0))
    offsets = np.mean(
        [[a[b, :, t, t - d] * seen[b, t, t - d] if d <= t else np.zeros(4) for d in range(40)] for b, t in queries], 0
    )
    assert_close(found["offset_share"], offsets.max(0))
    np.testing.assert_array_equal(found["offset"], offsets.argmax(0))
    for entry, (low, high) in enumerate([(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]):
        by_lag = [a[b, :, t, s] for b, t in queries for s in range(40) if seen[b, t, s] and low <= t - s <= high]
        assert_close(found["lag_curve"][:, entry], np.mean(by_lag, 0), err_msg=f"lag {low}")
        pairs = [(b, t, s) for b, t in queries for s in range(t) if seen[b, t, s] and low <= positions[b, s] <= high]
        assert_close(
            found["primacy_curve"][:, entry], np.mean([a[b, :, t, s] for b, t, s in pairs], 0), err_msg=f"position {low}"
        )

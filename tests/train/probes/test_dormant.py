"""Heads that rest on the sink."""

import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense
from plait.tests.train.probes.test_probes import look_at, measure, on
from plait.train.probes.base import PROBES


def test_by_hand():
    """Two documents and padding: 1 of 3 and 3 of 3 queries; the first tokens' own rows do not count."""
    mixed = 0.6 * on(6, 0, 0, 1, 3, 3, 0) + 0.4 * on(6, 0, 1, 0, 3, 4, 0)
    some = np.copy(mixed)
    some[0, 0, 4] = 0.5 * np.eye(6)[3] + 0.5 * np.eye(6)[4]  # half is not most
    found = measure("dormant", look_at(np.concatenate([some, on(6, 0, 0, 0, 3, 3, 0)], 1), [[3, 2]]))
    assert_close(found["dormant_share"], np.float32([1 / 3, 1]))
    assert np.isnan(measure("dormant", look_at(on(2, 0, 0), [[1, 1]]))["dormant_share"]).all()


def test_a_sink_logit_counts_as_the_sink():
    weights = on(4, 0, 1, 2, 3)
    for share, wanted in ((0.4, 1.0), (0.6, 0.0)):
        found = measure("dormant", look_at(share * weights, [[4]], column_mass=lambda: None))
        assert_close(found["dormant_share"], np.float32([wanted]))


def test_of_a_model():
    """Against attention in float64."""
    found, kept, rows, at = dense.measured("dormant", (4, 3, 2, 3), (5, 3), length=16, rows=16, seed=3)
    a, _ = dense.attention(kept, at)
    positions, real = np.asarray(at.positions), np.asarray(at.segment_ids) > 0
    first = [a[b, :, t, t - positions[b, t]] for b in range(2) for t in rows if real[b, t] and positions[b, t] > 0]
    wanted = (np.asarray(first) > 0.5).mean(0)
    assert 0 < wanted.mean() < 1
    assert_close(found["dormant_share"], wanted)


def test_dormancy_is_an_event():
    (watcher,) = PROBES["dormant"]().watchers(())
    events = [
        watcher.update(step, {"dormant_share": np.float32([[0.95, value]])}) for step, value in ((0, 0.1), (10, 0.92), (20, 0.95))
    ]
    assert [[(event.kind, event.head) for event in some] for some in events] == [[("dormant_at_start", 0)], [("dormancy", 1)], []]

"""Heads that differ, heads that do something."""

import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense
from plait.tests.train.probes.test_probes import look_at, measure, on


def test_by_hand():
    """Three heads of four tokens and padding: two look back by one, and one rests on the first."""
    back, first = on(5, 0, 0, 1, 2, 0), on(5, 0, 0, 0, 0, 0)
    found = measure("specialisation", look_at(np.concatenate([back, back, first], 1), [[4]]))
    assert_close(found["head_gate"], np.float32([2 / 3, 2 / 3, 0]))  # the second token's row is on the first in each
    assert_close(found["gate_imbalance"], np.float32(np.std([2, 2, 0]) / np.mean([2, 2, 0])))
    assert_close(found["head_divergence"], np.float32([1 / 3, 1 / 3, 2 / 3]))  # 1 bit in two of three rows
    assert_close(found["alike_heads"], np.float32(2 / 3))


def test_what_a_sink_logit_takes_is_not_given():
    weights = on(4, 0, 1, 2, 3) / 4
    assert_close(measure("specialisation", look_at(weights, [[4]], column_mass=lambda: None))["head_gate"], np.float32([0.25]))
    alone = measure("specialisation", look_at(weights, [[4]]))
    assert_close(alone["head_gate"], np.float32([1.0]))
    assert "head_divergence" not in alone and "alike_heads" not in alone, "a head alone is like no other"


def test_without_a_query_after_the_first_there_is_none():
    found = measure("specialisation", look_at(np.concatenate([on(2, 0, 0)] * 2, 1), [[1]]))
    assert all(np.isnan(value).all() for value in found.values()) and len(found) == 4


def test_of_a_model():
    """Against attention in float64."""
    found, kept, rows, at = dense.measured("specialisation", (25, 10), (20,), length=40, rows=8)
    a, _ = dense.attention(kept, at)
    positions, real = np.asarray(at.positions), np.asarray(at.segment_ids) > 0
    queries = [(b, t) for b in range(2) for t in rows if real[b, t] and positions[b, t] > 0]
    first = [a[b, :, t, t - positions[b, t]] for b, t in queries]
    assert_close(found["head_gate"], 1 - np.mean(first, 0))
    entropy = lambda p: -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
    between = np.zeros((4, 4))
    for b, t in queries:
        p = a[b, :, t]
        between += entropy((p[:, None] + p[None]) / 2) - (entropy(p)[:, None] + entropy(p)[None]) / 2
    assert_close(found["head_divergence"], between.sum(1) / len(queries) / 3)

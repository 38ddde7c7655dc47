"""Answers that look back at their prompts."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure, on


def ratio(weights, documents, predicted):
    look = look_at(weights, documents)
    at = dataclasses.replace(look.at, predicted=jnp.asarray(predicted, bool))
    return np.asarray(measure("lookback", dataclasses.replace(look, at=at))["lookback_ratio"])


def test_by_hand():
    """Prompt of three (the last predicts the first of the answer), answer of three, padding: half of the last row's weight on either
    side is 1/6 a token of both. The token that predicts the answer's first is given too."""
    first, last = on(8, 0, 0, 0, 0, 0, 0, 0, 0), on(8, 0, 1, 2, 3, 4, 5, 0, 0)
    both = (np.tri(8) / np.arange(1, 9)[:, None])[None, None]
    asked = on(8, 0, 1, 2, 2, 2, 2, 0, 0)
    found = ratio(np.concatenate([first, last, both, asked], 1), [[6]], [[0, 0, 1, 1, 1, 1, 0, 0]])
    assert_close(found, np.float32([1, 0, 0.5, 1]))


def test_where_nothing_is_given_or_nothing_answered_there_is_none():
    both = (np.tri(8) / np.arange(1, 9)[:, None])[None, None]
    for predicted in ([1] * 8, [0] * 8, [0] * 5 + [1, 0, 0]):
        assert np.isnan(ratio(both, [[6]], [predicted])).all(), predicted
    assert measure("lookback", look_at(both, [[6]])) == {}, "without a loss mask"


def test_of_several_documents():
    """Against means token by token: a document without a prompt, one with, one that is all prompt, and padding."""
    rng = np.random.default_rng(0)
    documents, predicted = [[5, 9, 4], [7, 8]], np.zeros((2, 20), int)
    predicted[0, :5], predicted[0, 8:14], predicted[1, 3:7], predicted[1, 9:15], predicted[:, 18:] = 1, 1, 1, 1, 1
    weights = rng.uniform(0.1, 1, (2, 3, 20, 20))
    look = look_at(weights, documents)
    segments = np.asarray(look.at.segment_ids)
    weights *= (segments[:, :, None] == segments[:, None, :])[:, None] * np.tri(20)
    shares = weights / weights.sum(-1, keepdims=True)
    ratios = []
    for b, start, begins, end in ((0, 5, 8, 14), (1, 0, 3, 7), (1, 7, 9, 15)):
        for t in range(begins + 1, end):
            given, new = (shares[b, :, t, a:e].mean(-1) for a, e in ((start, begins + 1), (begins + 1, t + 1)))
            ratios.append(given / (given + new))
    assert_close(ratio(weights, documents, predicted), np.mean(ratios, 0))

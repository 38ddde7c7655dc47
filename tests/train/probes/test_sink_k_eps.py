"""The published sink rate."""

import numpy as np

from plait.configs.probe import ProbeConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense
from plait.tests.train.probes.test_probes import drawn, look_at, measure
from plait.train.probes.sinks import THRESHOLD


def rate(weights, documents, *, k=1, **observed):
    return np.asarray(measure("sink_k_eps", look_at(weights, documents, **observed), ProbeConfig(first_k=k))["sink_k_eps"])


def test_the_threshold_comes_before_the_mean_and_short_pieces_are_left_out():
    """Shares 1 and 0 of two rows: one in two; rows that begin with 63 tokens, and one of padding, do not count."""
    short = [(63, 1.0), (17, 1.0)]
    weights, documents = drawn(80, [(80, 1.0)], [(64, 0.0), (16, 1.0)], short, short, [])
    assert_close(rate(weights, documents), np.float32([[50.0]]))
    assert np.isnan(rate(weights[2:], documents[2:])).all()
    assert measure("sink_k_eps", look_at(weights[:, :, :63, :63], [[63]] * 5)) == {}, "no row has 64 tokens"


def test_uniform_attention_has_none_and_its_first_weight_is_the_harmonic_mean():
    """alpha_1 = H_64 / 64 = 0.0741; scaled up to 0.3 it is at the line."""
    uniform = np.tri(64) / np.arange(1, 65)[:, None]
    assert not rate(uniform[None, None], [[64]]).any()
    harmonic = (1 / np.arange(1, 65)).mean()
    for share, wanted in ((0.999, 0.0), (1.001, 100.0)):
        more = (share * THRESHOLD - harmonic) / (1 - harmonic)  # of every row, moved to the first token
        mixed = (1 - more) * uniform + more * (np.arange(64) == 0)
        assert_close(rate(mixed[None, None], [[64]]), np.float32([[wanted]]))


def test_a_sink_logit_takes_its_share_of_softmax_rows_and_rows_of_other_kinds_are_made_shares():
    weights, documents = drawn(64, [(64, 0.5)])
    halved = {"column_mass": lambda: None}
    assert rate(weights, documents, **halved) == 100 and rate(weights / 2, documents, **halved) == 0
    assert rate(-weights / 2, documents) == 100


def test_the_kth_token_is_that_of_later_queries():
    weights = np.zeros((1, 1, 64, 64))
    weights[0, 0, :, 2] = 0.305  # by 62 queries: of 64 it would be below the line
    weights[0, 0, :2, 2] = 0
    weights[0, 0, :, 0] = 1 - weights[0, 0, :, 2]
    assert_close(rate(weights, [[64]], k=4), np.float32([[100, 0, 100, 0]]))


def test_of_a_model():
    """Against attention in float64."""
    documents = ((70,), (40, 30), (65, 5), (64,))
    found, kept, _, at = dense.measured("sink_k_eps", *documents, length=72, first_k=3)
    a, _ = dense.attention(kept, at)
    alpha = np.stack([a[:, :, k:64, k].mean(-1) for k in range(3)], -1)[[0, 2, 3]]
    assert_close(found["sink_k_eps"], 100 * (alpha > THRESHOLD).mean(0))

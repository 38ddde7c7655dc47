"""The logit of first tokens."""

import numpy as np

from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense


def test_of_a_model():
    """Against the logits in float64, mean over queries that have a token before; padding and other documents are not seen."""
    found, kept, rows, at = dense.measured("sink_logit", (9, 5), (11,), length=16, rows=8)
    _, logits = dense.attention(kept, at)
    differences = []
    for b in range(2):
        for row in rows:
            keys = np.flatnonzero(dense.visible(at)[b, row])
            if keys.size > 1:
                differences.append(logits[b, :, row, keys[0]] - logits[b, :, row, keys[1:]].mean(0))
    assert len(differences) == 11
    assert_close(found["sink_logit"], np.mean(differences, 0))


def test_sigmoid_heads_have_none():
    mixer = SoftmaxConfig(num_heads=2, head_dim=8, normalizer="sigmoid")
    assert "sink_logit" not in dense.measured("sink_logit", (9,), length=16, mixer=mixer)[0]

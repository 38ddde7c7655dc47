"""Attention in bfloat16."""

import ml_dtypes
import numpy as np

from plait.tests.tolerances import assert_close
from plait.tests.train.probes import dense


def test_of_a_model():
    """Zero where bfloat16 holds the inputs and each query sees one key; else about a rounding of the outputs, in both directions."""
    found, kept, _, at = dense.measured("numeric_deviation", (25, 10), (20,), length=40)
    a, _ = dense.attention(kept, at)
    real = np.asarray(at.segment_ids) > 0
    v = np.repeat(kept["v"], dense.HEADS // dense.KV_HEADS, axis=2)
    exact = np.einsum("bhts,bshv->bthv", a, v)
    rounded = {name: kept[name].astype(ml_dtypes.bfloat16).astype(np.float64) for name in kept}
    low, _ = dense.attention(rounded, at)
    v = np.repeat(rounded["v"], dense.HEADS // dense.KV_HEADS, axis=2)
    inputs_alone = np.abs(np.einsum("bhts,bshv->bthv", low, v) - exact)[real].max((0, 2))  # [H]
    one = np.abs(exact[real]).max((0, 2)) * 2.0**-8
    assert (found["numeric_deviation"] > 0.5 * inputs_alone).all()
    assert (found["numeric_deviation"] < inputs_alone + 4 * one).all()


def test_padding_has_no_part():
    """A single token's outputs are its values, rounded."""
    found, kept, *_ = dense.measured("numeric_deviation", (1,), length=8)
    v = kept["v"][0, 0].repeat(dense.HEADS // dense.KV_HEADS, axis=0)
    assert_close(found["numeric_deviation"], np.abs(v.astype(ml_dtypes.bfloat16).astype(np.float64) - v).max(-1))

"""Biases of low rank that stand for others, and sink logits that are keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import DistanceBias, LowRankBias, Mask, attention, attention_rows
from plait.tests.tolerances import assert_close


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_low_rank_bias_nearest_to_a_matrix_keeps_its_largest_singular_values():
    distance = np.arange(24)[:, None] - np.arange(24)[None]
    bias = jnp.asarray(np.stack([-np.log1p(np.abs(distance)), np.exp(-np.abs(distance) / 3.0)]), jnp.float32)
    left, values, right = np.linalg.svd(np.asarray(bias, np.float64), full_matrices=False)
    for rank in (2, 6, 24):
        found = LowRankBias.nearest(bias, rank)
        kept = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
        assert_close(jnp.einsum("thr,shr->hts", found.q[0], found.k[0]), kept)
    q = _random(1, 24, 2, 8)
    rows = lambda bias: attention_rows(q, q, jnp.arange(24), mask=Mask(), bias=bias)
    edges = tuple(range(-22, 24))
    table = jnp.stack([bias[:, 0, ::-1], bias[:, :, 0]], 1).reshape(2, -1)[:, [*range(24), *range(25, 48)]]
    assert_close(rows(found), rows(DistanceBias(table, edges=edges)))


def test_low_rank_bias_nearest_refuses_a_rank_that_no_matrix_of_the_shape_has():
    with pytest.raises(ValueError, match="rank=25 must be from 1 to 24"):
        LowRankBias.nearest(jnp.zeros((1, 24, 30)), 25)


def test_sink_logit_of_a_query_is_a_key_without_a_value():
    """A key k* that all see, whose value is 0, is the sink logit scale q . k* of each query."""
    q, k, v, key = _random(1, 9, 2, 4), _random(1, 9, 1, 4), _random(1, 9, 1, 4), _random(4) * 2
    z = jnp.einsum("bthk,k->bth", q, key) / 2
    o = attention(q, k, v, mask=Mask(), sinks=z)
    row = lambda x, first: jnp.concatenate([jnp.broadcast_to(first, (1, 1, *x.shape[2:])), x], axis=1)
    with_key = attention(row(q, 0.0), row(k, key), row(v, 0.0), mask=Mask())[:, 1:]
    assert_close(o, with_key)
    assert_close(o, attention(q, k, v, mask=Mask(), sinks=z, implementation="reference"))

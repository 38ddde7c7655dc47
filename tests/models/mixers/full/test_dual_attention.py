"""Relational heads beside sensory ones."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from plait.models.mixers.full.dual_attention import DualAttentionConfig
from plait.tests.models.mixers.full.layers import (
    AT,
    LENGTH,
    REAL,
    WIDTH,
    X,
    build,
    matrix,
)
from plait.tests.tolerances import assert_close


def test_symmetric_relations_have_one_matrix_and_count_its_parameters_once():
    config = DualAttentionConfig(num_heads=4, num_relations=4, num_symbols=6, symbol_heads=2)
    tied = dataclasses.replace(config, symmetric=True)
    assert config.num_params(WIDTH) - tied.num_params(WIDTH) == WIDTH * WIDTH // 2
    inputs, _ = build(tied).project(X, at=AT, state=None)
    np.testing.assert_array_equal(inputs.related, inputs.relating)


@pytest.mark.parametrize("causal", [True, False])
def test_relations_are_those_of_pairs(causal):
    """`sum_j A_ij W_r r_ij` through values that are wider, and with the relations of all pairs written out."""
    mixer = build(DualAttentionConfig(num_heads=4, num_relations=8, num_symbols=6, symbol_heads=2), causal=causal)
    inputs, _ = mixer.project(X, at=AT, state=None)
    finished = mixer.finish(mixer.attend(inputs, at=AT, state=None)[0], inputs, X)[:, :, 2:]
    a = np.asarray(mixer.implied(inputs, jnp.arange(LENGTH), at=AT), np.float64)[:, 2:]
    relating, related = (np.asarray(y, np.float64).reshape(2, LENGTH, 8, 2) for y in (inputs.relating, inputs.related))
    r = np.einsum("bilp,bjlp->bijl", relating, related) / np.sqrt(2)
    expected = np.einsum("bhij,bijl,hlk->bihk", a, r, matrix(mixer.of_relations))
    expected += np.einsum("bhij,bjhk->bihk", a, np.asarray(inputs.symbols, np.float64))
    assert_close(finished[REAL], expected[REAL])

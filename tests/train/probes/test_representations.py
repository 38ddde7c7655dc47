"""Similarity and rank of tokens, and the rank of states, against singular values in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure
from plait.train.probes.ranks import effective_rank


def rank(x):
    """exp of the entropy of the singular values, float64."""
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = values[values > 0] / values.sum()
    return np.exp(-(p * np.log(p)).sum())


def similarity(x):
    """The mean cosine of pairs, float64."""
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    return cosines[np.triu_indices(len(x), 1)].mean()


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (64, 32)])
def test_effective_rank_is_that_of_the_singular_values(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape)) * np.array([1e-12, 1e12])[:, None, None]
    assert_close(effective_rank(jnp.asarray(x, jnp.float32)), [rank(one) for one in x])


def made_of(values):
    """A square matrix with these singular values."""
    rng = np.random.default_rng(len(values))
    left, right = (np.linalg.qr(rng.normal(size=(len(values),) * 2))[0] for _ in range(2))
    return jnp.asarray((left * values) @ right, jnp.float32)


@pytest.mark.parametrize(
    "x",
    [
        made_of(np.logspace(0, -4, 24)),
        made_of([2.0] * 12 + [1.0] * 12),
        jnp.asarray(np.random.default_rng(4).normal(size=(24, 2)) @ np.random.default_rng(5).normal(size=(2, 16)), jnp.float32),
        jnp.asarray(np.random.default_rng(6).normal(size=(24, 16)), jnp.bfloat16),
    ],
    ids=["conditioned badly", "repeated", "of low rank", "bfloat16"],
)
def test_effective_rank_keeps_to_the_rule_whatever_the_singular_values(x):
    assert_close(effective_rank(x), np.float32(rank(np.asarray(x, np.float64))))


def test_effective_rank_of_what_needs_no_computation():
    ones, diagonal = np.ones((64, 32)), np.diag([3.0, 3.0, 0, 3.0])
    assert_close(effective_rank(jnp.asarray(ones)), np.float32(1))
    assert_close(effective_rank(jnp.asarray(diagonal)), np.float32(3))
    assert_close(effective_rank(jnp.zeros((3, 3))), np.float32(0))
    assert np.isnan(effective_rank(jnp.full((3, 3), jnp.inf)))


def test_tokens_are_those_of_each_rows_longest_document_without_its_first():
    """Rows of several documents and padding: what others hold is not seen, nor what a document begins with."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 20, 8)) + 1.0
    documents = [[4, 9, 3], [5, 5], []]
    parts = [x[0, 5:13], x[1, 1:5]]  # the first of documents that are equally long
    found = measure("representations", look_at(np.zeros((3, 1, 20, 20)), documents, residual=x))
    assert_close(found["token_similarity"], np.mean([similarity(part) for part in parts]))
    assert_close(found["token_rank"], np.mean([rank(part) for part in parts]))


def test_long_documents_are_sampled_evenly():
    x = np.random.default_rng(2).normal(size=(1, 150, 8))
    found = measure("representations", look_at(np.zeros((1, 1, 150, 150)), [[12, 131]], residual=x))
    part = x[0, 13 + np.arange(64) * 130 // 64]
    assert_close(found["token_similarity"], similarity(part))
    assert_close(found["token_rank"], rank(part))


def test_equal_tokens_are_collapse_and_single_ones_tell_nothing():
    alike = np.ones((1, 6, 4)) * np.array([2.0, -1, 0.5, 3])
    found = measure("representations", look_at(np.zeros((1, 1, 6, 6)), [[6]], residual=alike * np.arange(1, 7)[None, :, None]))
    assert_close(found["token_similarity"], np.float32(1))
    assert_close(found["token_rank"], np.float32(1))
    short = measure("representations", look_at(np.zeros((1, 1, 6, 6)), [[1, 1, 1]], residual=alike))
    assert np.isnan(short["token_similarity"]) and np.isnan(short["token_rank"])
    pair = measure("representations", look_at(np.zeros((1, 1, 6, 6)), [[2]], residual=alike))
    assert np.isnan(pair["token_similarity"]) and pair["token_rank"] == 1


def test_state_rank_is_the_mean_over_sequences_that_have_tokens():
    memory = np.random.default_rng(3).normal(size=(3, 2, 4, 6))
    look = look_at(np.zeros((3, 2, 5, 5)), [[5], [3], []], memory=jnp.asarray(memory, jnp.float32))
    expected = [np.mean([rank(memory[row, head]) for row in range(2)]) for head in range(2)]
    assert_close(measure("state_rank", look)["state_rank"], expected)
    row = look_at(np.zeros((1, 2, 5, 5)), [[5]], memory=jnp.ones((1, 2, 1, 9)))
    assert measure("state_rank", row) == {} == measure("state_rank", look_at(np.zeros((1, 2, 5, 5)), [[5]]))

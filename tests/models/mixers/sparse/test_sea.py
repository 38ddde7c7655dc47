"""SEA against the paper and the authors' code read plainly: float64, one document, without positions; and its loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.kernels import Mask, Tokens
from plait.models.mixers.sparse import columns
from plait.models.mixers.sparse.map_loss import map_loss
from plait.models.mixers.sparse.sea import LOSS, SEAConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.mixers.sparse.test_chosen import AT, agrees, made
from plait.tests.models.mixers.sparse.test_masked import HEAD_DIM, HEADS, LENGTH, SMALL, softmax
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close, in_float64

COLUMNS, KEPT = 8, 2
CONFIG = SEAConfig(**SMALL, width=COLUMNS, top_k=KEPT)


def moved(layer: Any) -> None:
    """Moves what begins at zeros and ones, in place."""
    rng = np.random.default_rng(3)
    for _, p in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        p[...] = p[...] + jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype)


def normal(x: np.ndarray, norm: Any) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    scale, bias = (np.asarray(p[...], np.float64) for p in (norm.scale, norm.bias))
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def convolved(x: np.ndarray, conv: Any) -> np.ndarray:
    """Of `[T, C, W]`, one output at a time."""
    weight, bias = (np.asarray(p[...], np.float64) for p in (conv.weight, conv.bias))
    y = np.zeros_like(x) + bias[:, None]
    for t in range(len(x)):
        for w in range(x.shape[2]):
            for i in range(3):
                for j in range(3):
                    row, column = t - 2 * i, w + 2 * (j - 1)
                    if row >= 0 and 0 <= column < x.shape[2]:
                        y[t, :, w] += x[row, :, column] @ weight[i, j]
    return np.maximum(y, 0)


def estimated(layer: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[T, H, K]` and scales `[T, H, 2]`."""
    part = layer.estimator
    w = lambda p: np.asarray(p[...], np.float64)
    linear = lambda dense, x: x @ w(dense.kernel) + w(dense.bias)
    feature = lambda x: np.maximum(x @ w(part.features).T / HEAD_DIM**0.25, 0) + 1e-3
    angles = np.arange(LENGTH)[:, None] / 10_000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(LENGTH, HEAD_DIM)
    known = np.zeros((LENGTH, HEADS, 2 * HEAD_DIM))
    for h in range(HEADS):
        weights = np.tril(feature(q[:, h]) @ feature(k[:, h]).T)
        context = weights / weights.sum(-1, keepdims=True) @ np.concatenate([waves, v[:, h]], -1)
        t = normal(linear(part.encode, np.concatenate([context, v[:, h]], -1)), part.encode_norm)
        known[:, h] = t * (1 + np.vectorize(math.erf)(t / 2**0.5)) / 2
    rows = linear(part.rows, known).reshape(LENGTH, 2 * HEADS, COLUMNS // 4)
    rows = convolved(convolved(normal(rows, part.rows_norm), part.first), part.second)
    map_ = np.einsum("tcw,ch->thw", rows, w(part.last)) + w(part.last_bias)[:, None]
    scales = 1 / (1 + np.exp(-linear(part.scales, known)))
    return normal(np.repeat(map_, 4, axis=-1), part.last_norm), scales


def column(j: int, n: int) -> int:
    """That of token j of n, as the authors' resize_m_to_t.py has it."""
    return math.floor((j + 0.5) / n * COLUMNS - 1e-4)


@pytest.mark.proves("sea")
def test_sea_sees_what_lies_under_the_best_columns_of_its_estimate():
    layer, x, heads = made(CONFIG)
    moved(layer)
    q, k, v = (heads(dense) for dense in (layer.q, layer.k, layer.v))
    scores, scales = estimated(layer, q, k, v)
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    o, loss, number = np.zeros_like(q), 0.0, []
    for i in range(LENGTH):
        n = i + 1
        count = min(max(math.floor(HEADS * KEPT * COLUMNS / n + 0.5), 1), HEADS * COLUMNS)
        alive = set(np.argsort(-chances[i].ravel(), kind="stable")[:count])
        for h in range(HEADS):
            under = [column(j, n) for j in range(n)]
            seen = np.array([h * COLUMNS + c in alive for c in under])
            z = (k[:n, h] @ q[i, h] / HEAD_DIM**0.5)[None]
            number.append(seen.sum())
            a, b = scales[i, h]
            o[i, h] = b * a * softmax(z, seen[None])[0][0] @ v[:n, h] + (1 - b) * v[:n, h].mean(0)
            p, e = softmax(z, np.ones((1, n), bool))[0][0], np.exp(scores[i, h, under])
            e = e / e.sum()
            loss += (0.1 * (p * np.log(p / e)).sum() + ((p - e) ** 2).mean()) / LENGTH / HEADS
    assert min(number) == 0 and max(number) > KEPT, "heads share what all of them choose"
    agrees(layer, x, o)
    graph, state = nnx.split(layer)
    run = quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).losses[LOSS])
    assert_close(run(state, jnp.asarray(x, jnp.float32)[None]), loss)


@pytest.mark.parametrize("width", usually([4, 8, 12], 8))
def test_columns_cover_each_token_once(width):
    seen = np.arange(1, 41)
    first = np.asarray(columns.starts(jnp.asarray(seen), width))
    for n, edges in zip(seen, first, strict=True):
        expected = [math.floor((j + 0.5) / n * width - 1e-4) for j in range(n)]
        assert list(np.searchsorted(edges, np.arange(n), side="right") - 1) == expected
        assert list(np.asarray(columns.column_of(jnp.arange(n), jnp.asarray(n), width))) == expected
        assert (edges[0], edges[-1]) == (0, n)


def test_tokens_under_any_share_of_the_columns_have_room():
    """Whichever heads the best columns are of, and those of one head alone."""
    heads, width, kept, length = 3, 8, 2, 40
    seen = jnp.arange(1, length + 1)[None]
    for seed in range(4):
        scores = (
            jax.random.normal(jax.random.key(seed), (1, length, heads, width))
            + jnp.asarray([9.0 * seed, 0, 0])[None, None, :, None]
        )
        chosen = columns.best(scores, columns.how_many(seen, heads, width, kept))
        most = columns.most_tokens(length, heads, width, kept)
        tokens = np.asarray(columns.tokens_under(chosen, seen, most))
        for i in range(length):
            for h in range(heads):
                under = [j for j in range(i + 1) if chosen[0, i, h, math.floor((j + 0.5) / (i + 1) * width - 1e-4)]]
                assert [j for j in tokens[0, i, h] if j >= 0] == under


def test_columns_of_a_document_have_its_own_scores_packed_padded_and_token_by_token():
    """What the contract suite sees of them is the choice, and short documents choose all."""
    layer, x, _ = made(CONFIG)
    moved(layer)
    before, own = 5, 9
    x = jnp.asarray(x, jnp.float32)[None, : before + own]
    scores = lambda x, at: layer.project(x, at=at, state=None)[0].scores
    expected = scores(x[:, before:], layout((own,), length=own))
    packed = layout((before, own), length=before + own)
    assert_close(scores(x, packed)[:, before:], expected)
    padded = dataclasses.replace(packed, segment_ids=jnp.maximum(packed.segment_ids - 1, 0))
    assert_close(scores(x, padded)[:, before:], expected)
    found, state = [], layer.init_state(1, own)
    for t in range(own):
        here = Tokens(None, jnp.ones((1, 1), jnp.int32), jnp.full((1, 1), t, jnp.int32))
        inputs, state = layer.project_step(x[:, before + t : before + t + 1], at=here, state=state)
        found.append(inputs.scores)
    assert_close(jnp.concatenate(found, axis=1), expected)


def test_the_loss_leaves_queries_and_keys_alone_and_its_gradient_is_finite_differences():
    """Of a packed row with padding, whose rows are made some at a time; in float64."""
    length, heads, width = 40, 2, 8
    at = layout((20, 3, 13), length=length)
    rng = np.random.default_rng(0)
    shapes = (1, length, heads, width), (1, length, heads, 6), (1, length, 1, 6)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    loss = lambda scores, q, k: map_loss(scores, q, k, at=at, mask=Mask(), scale=0.4)
    gradients = quick_jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    assert np.asarray(gradients[0]).any() and not any(np.asarray(g).any() for g in gradients[1:])
    assert not np.asarray(gradients[0])[np.asarray(at.segment_ids) == 0].any()
    way = jnp.cos(jnp.arange(inputs[0].size, dtype=jnp.float32)).reshape(inputs[0].shape)

    def slopes(scores, q, k, way):
        value = lambda by: loss(scores + by * way, q, k).astype(scores.dtype)
        step = 1e-6
        return jax.grad(value)(jnp.zeros((), scores.dtype)), (value(step) - value(-step)) / (2 * step)

    exact, found = in_float64(quick_jit(slopes), *inputs, way)
    assert abs(found / exact - 1) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10}, "width=10 must be a multiple of 4; use 8 or 12"),
        ({"width": 2}, "width=2 must be a whole number from 4 to 1024"),
        ({"top_k": 0}, "top_k=0 must be a whole number from 1"),
        ({"positions": ALiBiConfig()}, "positions=alibi adds to the logits, and the features"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_a_choice_that_no_integer_counts_is_refused():
    with pytest.raises(
        ValueError, match=r"top_k=1073741824 times num_heads=4 times width=8 must be at most .*; use at most 33554432"
    ):
        dataclasses.replace(CONFIG, top_k=2**30).fit(24)

"""Sparse mixers that choose blocks or tokens, against their papers read plainly: float64, one document, without positions."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.sparse.bigbird import BigBirdConfig, blocks_of
from plait.models.mixers.sparse.hcam import HCAMConfig
from plait.models.mixers.sparse.landmark import LandmarkConfig
from plait.models.mixers.sparse.moa import MoAConfig
from plait.models.mixers.sparse.routing import RoutingConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.models.mixers.sparse.test_masked import HEAD_DIM, HEADS, LENGTH, SMALL, WIDTH, check, masked, softmax
from plait.tests.tolerances import assert_close

AT = layout((LENGTH,), length=LENGTH)


def made(config: Any) -> tuple[Any, np.ndarray, Any]:
    """A layer, its input `[T, D]` in float64, and a function that gives projections of that by head."""
    layer = config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH))
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH)), np.float64)[0]
    return layer, x, lambda dense: (x @ np.asarray(dense.kernel[...], np.float64)).reshape(LENGTH, -1, HEAD_DIM)


def agrees(layer: Any, x: np.ndarray, o: np.ndarray) -> None:
    """That the layer's output is that of these heads `[T, H, K]`."""
    graph, state = nnx.split(layer)
    run = quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=AT, carry={}).y)
    y = run(state, jnp.asarray(x, jnp.float32)[None])[0]
    assert_close(y, o.reshape(LENGTH, -1) @ np.asarray(layer.o.kernel[...], np.float64))


@pytest.mark.proves("bigbird")
def test_bigbird_sees_a_window_the_first_and_random_blocks():
    config = BigBirdConfig(**SMALL, block_size=2, num_random_blocks=2, seed=3)
    table = blocks_of(config, HEADS, LENGTH // 2)
    for own in range(LENGTH // 2):
        for head in range(HEADS):
            seen = [n for n in table[own, head] if n >= 0]
            assert len(set(seen)) == len(seen) == min(own + 1, 5) and {own, max(own - 1, 0), 0} <= set(seen) <= set(
                range(own + 1)
            )
    assert len({tuple(sorted(table[11, head])) for head in range(HEADS)}) > 1, "heads draw by themselves"
    assert (blocks_of(config, HEADS, 5)[:, :, :5] == table[:5]).all(), "whatever the length"
    assert (blocks_of(BigBirdConfig(**SMALL, block_size=2, num_random_blocks=2), HEADS, 12) != table).any(), "by the seed"
    check(config, masked(lambda h, i, j: j <= i and j // 2 in table[i // 2, h]))


@pytest.mark.proves("moa")
def test_moa_has_the_spans_of_its_plan(tmp_path):
    plan = tmp_path / "plan.json"
    rules = {"alphas": [[9] * HEADS, [4, 0, -8, 2]], "betas": [[0] * HEADS, [0.0, 0.25, 0.5, 0.125]]}
    plan.write_text(json.dumps(rules))
    config = MoAConfig(**SMALL, plan=str(plan), layer=1, length=LENGTH, num_sink_tokens=2)
    assert config.spans(HEADS) == (4, 6, 4, 5)
    kept = config.settled(WIDTH)
    assert (kept.plan, kept.spans(HEADS)) == (None, (4, 6, 4, 5))
    assert config.slots() == kept.slots() and kept.slots().window_size == 6
    check(config, masked(lambda h, i, j: j <= i and (j < 2 or i - j < (4, 6, 4, 5)[h])))
    for text, options, message in (
        (json.dumps(rules), {"num_heads": 3}, r"has 4 alphas in layer 1, and num_heads=3; use a plan that was searched for this"),
        (
            json.dumps({**rules, "betas": rules["betas"][:1]}),
            {"layer": 0},
            r"has alphas of 2 layers and betas of 1; it must have both",
        ),
        (json.dumps(rules), {"layer": 2}, r"layer=2 must be one of the 2 of plan="),
        ('{"alphas": [[1]]}', {}, r"layer=1 must be one of the 1"),
        ('{"alphas": [[1], [2]]}', {}, r"has no 'betas' of layers and heads; it must be JSON as"),
        ('{"alphas": [["a"]]}', {}, r"has no 'alphas'"),
        ("alphas", {}, r"cannot be read"),
        ("[" * 9999, {}, r"cannot be read \(it is nested more than"),
        ('{"alphas": [], "alphas": []}', {}, r"cannot be read"),
        (json.dumps({**rules, "betas": [[25] * HEADS] * 2}), {}, r"has 25 among the betas of layer 1; each must be .* at most 1"),
        (json.dumps({**rules, "alphas": [[1e10] * HEADS] * 2}), {}, r"has 1.* among the alphas of layer 1"),
    ):
        plan.write_text(text)
        wrong = MoAConfig(**{**SMALL, "head_dim": 6, "layer": 1, **options}, plan=str(plan))
        with pytest.raises(ValueError, match=message):
            wrong.fit(WIDTH)
    with pytest.raises(ValueError, match=r"plan='x' has alphas of its own; leave alphas out, or the plan"):
        MoAConfig(plan="x", alphas=(1.0,))
    with pytest.raises(ValueError, match=r"layer=1 is of a plan, and plan is None"):
        MoAConfig(layer=1)
    with pytest.raises(ValueError, match=r"betas=\(0.5,\) must have a number for each of num_heads=4"):
        MoAConfig(**SMALL, betas=(0.5,)).fit(WIDTH)


@pytest.mark.proves("landmark")
@pytest.mark.parametrize("top_k", [None, 2])
def test_landmark_is_a_softmax_in_groups(top_k):
    layer, x, heads = made(LandmarkConfig(**SMALL, block_size=4, top_k=top_k))
    q, k, v = (heads(dense) for dense in (layer.q, layer.k, layer.v))
    o = np.zeros_like(q)
    for h in range(HEADS):
        z = q[:, h] @ k[:, h].T / HEAD_DIM**0.5
        for i in range(LENGTH):
            marks = [m for m in range(3, i, 4) if m // 4 < i // 4]
            if top_k is not None:
                marks = sorted(marks, key=lambda m: -z[i, m])[:top_k]
            own = [j for j in range(i // 4 * 4, i + 1) if j % 4 != 3]
            group = np.exp(z[i, own + marks])
            share = dict(zip(own + marks, group / group.sum(), strict=True))
            o[i, h] = sum(share[j] * v[j, h] for j in own)
            for m in marks:
                inside = np.exp(z[i, m - 3 : m])
                o[i, h] += share[m] * (inside / inside.sum()) @ v[m - 3 : m, h]
    agrees(layer, x, o)


@pytest.mark.proves("hcam")
def test_hcam_mixes_chunks_by_their_relevance():
    layer, x, heads = made(HCAMConfig(**SMALL, block_size=4, top_k=2))
    q, k, v, looks_for, adds = (heads(dense) for dense in (layer.q, layer.k, layer.v, layer.relevance, layer.summary))
    o = np.zeros_like(q)
    for i in range(LENGTH):
        for h in range(HEADS):
            own = slice(i // 4 * 4, i + 1)
            weights, _ = softmax((k[own, h] @ q[i, h] / HEAD_DIM**0.5)[None], np.ones((1, i % 4 + 1), bool))
            o[i, h] = weights[0] @ v[own, h]
        if i < 4:
            continue
        summaries = adds[: i // 4 * 4, 0].reshape(-1, 4, HEAD_DIM).mean(1)
        z = summaries @ looks_for[i, 0] / HEAD_DIM**0.5
        best = np.argsort(-z)[:2]
        for n, relevance in zip(best, np.exp(z[best]) / np.exp(z[best]).sum(), strict=True):
            for h in range(HEADS):
                chunk = slice(4 * n, 4 * n + 4)
                weights, _ = softmax((k[chunk, h] @ q[i, h] / HEAD_DIM**0.5)[None], np.ones((1, 4), bool))
                o[i, h] += relevance * weights[0] @ v[chunk, h]
    agrees(layer, x, o)


@pytest.mark.proves("routing")
def test_routing_sees_the_best_of_its_cluster_and_moves_centroids():
    layer, x, heads = made(RoutingConfig(**SMALL, num_clusters=3, top_k=5, decay=0.75))

    def normal(y):
        y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    q, k, v = normal(heads(layer.q)), normal(heads(layer.k)), heads(layer.v)
    centroids = np.asarray(layer.centroids[...], np.float64)
    o, moved = np.zeros_like(q), centroids.copy()
    for h in range(HEADS):
        cluster, scores = (q[:, h] @ centroids[h].T).argmax(-1), k[:, h] @ centroids[h].T
        for i in range(LENGTH):
            seen = np.argsort(-scores[: i + 1, cluster[i]])[:5]
            weights, _ = softmax((k[seen, h] @ q[i, h] / HEAD_DIM**0.5)[None], np.ones((1, len(seen)), bool))
            o[i, h] = weights[0] @ v[seen, h]
        for c in range(3):
            means = [y[of == c].mean(0) if (of == c).any() else 0 for y, of in ((q[:, h], cluster), (k[:, h], scores.argmax(-1)))]
            moved[h, c] = 0.75 * centroids[h, c] + 0.125 * (means[0] + means[1])
    agrees(layer, x, o)
    inputs, _ = layer.project(jnp.asarray(x, jnp.float32)[None], at=AT, state=None)
    layer.settle(layer.counts(inputs, None, at=AT))
    assert_close(layer.centroids[...], moved / np.linalg.norm(moved, axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LandmarkConfig(block_size=1), "block_size=1 must hold a token and its landmark; use 64"),
        (lambda: BigBirdConfig(num_window_blocks=0), "num_window_blocks=0 must be a whole number from 1"),
        (lambda: RoutingConfig(num_clusters=0), "num_clusters=0 must be a whole number from 1"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Sparse mixers of a fixed pattern, against their papers read plainly: float64, one head, one document, without positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.sparse.dilated import DilatedConfig
from plait.models.mixers.sparse.longformer import LongformerConfig
from plait.models.mixers.sparse.masked import Masked, MaskedConfig
from plait.models.mixers.sparse.neighborhood import NeighborhoodConfig
from plait.models.mixers.sparse.scca import SCCAConfig
from plait.models.mixers.sparse.shifted import ShiftedConfig
from plait.models.positions.alibi import ALiBiConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close

WIDTH, LENGTH, HEADS, HEAD_DIM = 24, 24, 4, 6
SMALL: dict[str, Any] = {"num_heads": HEADS, "head_dim": HEAD_DIM, "positions": None}
Head = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The output `[T, K]` of a head of q, k and v `[T, K]`."""


def build(config: MaskedConfig, causal: bool = True) -> Masked:
    return config.build(WIDTH, BuildContext(rngs=nnx.Rngs(0), seq_len=LENGTH, causal=causal))


def softmax(z: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of rows of logits, zero where nothing is seen, and the denominators."""
    e = np.where(seen, np.exp(z), 0)
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total), total[..., 0]


def check(config: MaskedConfig, head: Head, causal: bool = True, length: int = LENGTH) -> None:
    """That the layer is the heads, between its projections."""
    layer = build(config, causal)
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, length, WIDTH)), np.float64)
    w = lambda dense: np.asarray(dense.kernel[...], np.float64)
    q, k, v = ((x[0] @ w(dense)).reshape(length, -1, HEAD_DIM) for dense in (layer.q, layer.k, layer.v))
    share = HEADS // k.shape[1]
    o = np.stack([head(h, q[:, h], k[:, h // share], v[:, h // share]) for h in range(HEADS)], axis=1)
    graph, state = nnx.split(layer)
    run = quick_jit(lambda state, x: nnx.merge(graph, state)(x, at=layout((length,), length=length), carry={}).y)
    assert_close(run(state, jnp.asarray(x, jnp.float32))[0], o.reshape(length, -1) @ w(layer.o))


def masked(seen: Callable[[int, int, int], bool]) -> Head:
    """Of softmax over the keys j that query i sees in head h."""

    def head(h, q, k, v):
        n = len(q)
        shown = np.array([[seen(h, i, j) for j in range(n)] for i in range(n)])
        return softmax(q @ k.T / HEAD_DIM**0.5, shown)[0] @ v

    return head


@pytest.mark.proves("shifted")
@pytest.mark.parametrize("causal", [True, False])
def test_shifted_is_the_roll_the_groups_and_the_roll_back(causal):
    size = 8

    def head(h, q, k, v):
        order = np.arange(LENGTH)
        if h >= HEADS // 2:
            q, k, v, order = (np.roll(a, -size // 2, axis=0) for a in (q, k, v, order))
        o = np.zeros_like(q)
        for start in range(0, LENGTH, size):
            group = slice(start, start + size)
            at = order[group]
            seen = abs(at[:, None] - at[None]) < size  # the roll brought the last and the first into one group
            seen &= (at[:, None] >= at[None]) | (not causal)
            o[group] = softmax(q[group] @ k[group].T / HEAD_DIM**0.5, seen)[0] @ v[group]
        return np.roll(o, size // 2, axis=0) if h >= HEADS // 2 else o

    check(ShiftedConfig(**SMALL, group_size=size), head, causal)
    check(ShiftedConfig(**SMALL, num_kv_heads=2, group_size=size), head, causal)


@pytest.mark.proves("shifted")
def test_sinks_and_fewer_moved_heads():
    def seen(h, i, j):
        moved = 4 if h == 3 else 0
        return j <= i and (j < 2 or (i + moved) // 8 == (j + moved) // 8)

    check(ShiftedConfig(**SMALL, group_size=8, num_shifted_heads=1, num_sink_tokens=2), masked(seen))


@pytest.mark.proves("scca")
@pytest.mark.parametrize(
    ("options", "shifts", "stride"),
    [({}, (0, 0, 4, 4), 1), ({"shifts": "flow"}, (0, 2, 4, 6), 1), ({"dilation": 3}, (0, 1, 2, 0), 3)],
    ids=["fixed", "flow", "dilated"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_scca_moves_keys_and_values_into_other_chunks(causal, options, shifts, stride):
    size = 8

    def head(h, q, k, v):
        order = np.arange(LENGTH) - shifts[h]  # which key stands at each place; those below 0 came from the end
        k, v = (np.roll(a, shifts[h], axis=0) for a in (k, v))
        o = np.zeros_like(q)
        for start in range(0, LENGTH, size):
            chunk = np.arange(start, start + size)
            seen = (order[chunk] >= 0)[None] & ((chunk[:, None] - chunk[None]) % stride == 0)
            seen = seen & ((chunk[:, None] >= order[chunk][None]) | (not causal))
            o[chunk] = softmax(q[chunk] @ k[chunk].T / HEAD_DIM**0.5, seen)[0] @ v[chunk]
        return o

    check(SCCAConfig(**SMALL, chunk_size=size, **options), head, causal)


@pytest.mark.proves("neighborhood")
@pytest.mark.parametrize("length", [24, 5, 4])
def test_neighborhood_is_the_nearest_keys(length):
    def seen(h, i, j):
        nearest = sorted(range(length), key=lambda other: abs(i - other))[:5]
        return j in nearest

    check(NeighborhoodConfig(**SMALL, window_size=5), masked(seen), causal=False, length=length)


@pytest.mark.proves("neighborhood")
def test_neighborhood_moves_an_even_window_inwards_and_looking_back_is_a_window():
    start = lambda i: min(max(i - 2, 0), LENGTH - 4)
    check(NeighborhoodConfig(**SMALL, window_size=4), masked(lambda h, i, j: 0 <= j - start(i) < 4), causal=False)
    check(NeighborhoodConfig(**SMALL, window_size=4), masked(lambda h, i, j: 0 <= i - j < 4))


@pytest.mark.proves("longformer")
@pytest.mark.parametrize("causal", [True, False])
def test_longformer_is_a_window_a_dilated_window_and_global_tokens(causal):
    def seen(h, i, j):
        stride = 3 if h == HEADS - 1 else 1
        near = abs(i - j) % stride == 0 and abs(i - j) // stride < 3
        return (near or j < 2 or (i < 2 and not causal)) and (j <= i or not causal)

    options = {"window_size": 3, "num_global_tokens": 2, "num_dilated_heads": 1, "dilation": 3}
    check(LongformerConfig(**SMALL, **options), masked(seen), causal)


PAIRS = ((8, 1), (12, 2), (20, 3))  # 3 does not divide 20, nor 20 the length


def longnet(causal: bool, share: int = 1) -> Head:
    """Every r-th row of each segment on its own, and the outputs by their denominators."""

    def head(h, q, k, v):
        outputs, denominators = np.zeros((len(PAIRS), *q.shape)), np.zeros((len(PAIRS), len(q)))
        for n, (length, dilation) in enumerate(PAIRS):
            for start in range(0, len(q), length):
                rows = np.arange(start, min(start + length, len(q)))[h // share % dilation :: dilation]
                seen = np.tri(len(rows), dtype=bool) | (not causal)
                weights, denominators[n, rows] = softmax(q[rows] @ k[rows].T / HEAD_DIM**0.5, seen)
                outputs[n, rows] = weights @ v[rows]
        return ((denominators / denominators.sum(0))[..., None] * outputs).sum(0)

    return head


@pytest.mark.proves("dilated")
@pytest.mark.parametrize("causal", [True, False])
def test_dilated_is_every_rth_row_of_each_segment_mixed_by_denominators(causal):
    pairs = dict(zip(("segment_lengths", "dilations"), zip(*PAIRS)))
    check(DilatedConfig(**SMALL, **pairs), longnet(causal), causal)
    check(DilatedConfig(**SMALL, **pairs, num_kv_heads=2), longnet(causal, share=2), causal)


@pytest.mark.parametrize(
    "config",
    [
        ShiftedConfig(**SMALL, group_size=5, num_sink_tokens=3),
        SCCAConfig(**SMALL, chunk_size=7, shifts="flow"),
        SCCAConfig(**SMALL, chunk_size=7, dilation=2),
        LongformerConfig(**SMALL, window_size=3, num_dilated_heads=2, dilation=4),
        NeighborhoodConfig(**SMALL, window_size=5),
    ],
    ids=lambda config: config.name,
)
def test_mean_keys_is_a_count_of_the_mask(config):
    mask, at = config.mask(HEADS, True), np.arange(19)
    count = [
        one.reaches(jnp.asarray(at[:, None]), jnp.asarray(at[None])).sum() / len(at) for one in getattr(mask, "masks", [mask])
    ]
    assert config.seen_keys(WIDTH, len(at)) == pytest.approx(float(np.mean(count)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(ShiftedConfig(**SMALL, num_shifted_heads=5)), "num_shifted_heads=5 must be at most num_heads=4; use 2"),
        (lambda: build(LongformerConfig(**SMALL, num_dilated_heads=5)), "num_dilated_heads=5 must be at most num_heads=4"),
        (lambda: SCCAConfig(**SMALL, chunk_size=4, dilation=5), "dilation=5 must be at most chunk_size=4"),
        (lambda: DilatedConfig(**SMALL, dilations=(1, 2)), r"dilations=\(1, 2\) must be as many as segment_lengths="),
        (lambda: build(DilatedConfig(**SMALL | {"positions": ALiBiConfig()})), "positions must turn or be added"),
        (
            lambda: build(NeighborhoodConfig(**SMALL | {"positions": ALiBiConfig()}), causal=False),
            "positions must turn or be added",
        ),
    ],
    ids=["shifted heads", "dilated heads", "dilation", "pairs", "biased pairs", "biased neighborhood"],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The references, and what is chunked on any device, against loops that share nothing with them, wherever padding stands."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import (
    ChunkMask,
    GlobalMask,
    LowRankBias,
    Mask,
    PowerMask,
    SelectedBlocks,
    Tokens,
    attention,
    attention_rows,
    column_mass,
    first_masses,
    routed_attention,
    short_conv,
)
from plait.tests.kernels import cases, loops
from plait.tests.tolerances import assert_close

LENGTH, HEADS, KV_HEADS, DIM = 30, 2, 1, 4

LAYOUTS = {  # runs of (id, places) in two rows
    "whole": [[(1, 30)], [(1, 30)]],
    "left": [[(0, 2), (1, 28)], [(0, 21), (1, 9)]],
    "right": [[(1, 23), (0, 7)], [(1, 1), (0, 29)]],
    "between": [[(1, 9), (0, 4), (2, 17)], [(0, 3), (1, 5), (0, 9), (2, 6), (0, 7)]],
    "inside": [[(1, 9), (0, 4), (1, 17)], [(0, 3), (1, 8), (2, 5), (0, 9), (2, 5)]],
    "none": [[(0, 30)], [(0, 12), (3, 18)]],
    "packed": [[(1, 2), (2, 11), (3, 1), (4, 16)], [(1, 15), (2, 15)]],
    "any ids": [[(2**30, 6), (7, 5), (0, 1), (2**24 + 1, 8), (2**24, 10)], [(0, 8), (9, 7), (4, 1), (2, 14)]],
}


def _ids(layout: str) -> np.ndarray:
    return np.stack([np.repeat(*np.asarray(row).T) for row in LAYOUTS[layout]]).astype(np.int32)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SINKS = Mask(window_size=4, num_sink_tokens=3)
BIAS = tuple(_random(2, LENGTH, HEADS, 3, seed=seed) for seed in (4, 5))
KINDS: dict[str, tuple[Mask, dict[str, Any]]] = {
    "causal": (Mask(), {}),
    "full": (Mask(causal=False), {}),
    "window": (Mask(window_size=5), {"sinks": np.float32([0.5, -1])}),
    "sinks": (SINKS, {}),
    "two-sided": (Mask(causal=False, window_size=5, right_window_size=2, num_sink_tokens=2), {}),
    "dilated": (Mask(window_size=3, dilation=4, num_sink_tokens=1), {}),
    "power": (PowerMask(block_size=3, window_size=2, num_sink_tokens=1), {"soft_cap": 1.5}),
    "chunk": (ChunkMask(chunk_size=7, shift=3, kv_shift=5, num_sink_tokens=1), {}),
    "chunk-dilated": (ChunkMask(causal=False, chunk_size=9, kv_shift=2, dilation=2), {}),
    "global": (GlobalMask(window_size=3, num_global_tokens=2), {}),
    "sigmoid": (SINKS, {"sigmoid_bias": np.float32([-3, -1])}),
    "bias": (Mask(), {"bias": BIAS, "soft_cap": 2.0}),
    "selected": (Mask(), {"selected": (np.random.default_rng(1).integers(-1, 6, (2, LENGTH, HEADS, 3), np.int32), 3)}),
    "selected-sinks": (
        SINKS,
        {"selected": (np.random.default_rng(2).integers(-1, 9, (2, LENGTH, 1, 4), np.int32), 4), "sinks": np.float32([0.5, -1])},
    ),
    "selected-tokens": (Mask(), {"selected": (np.random.default_rng(3).integers(-1, LENGTH, (2, LENGTH, 1, 9), np.int32), 1)}),
}
INPUTS = tuple(_random(2, LENGTH, heads, DIM, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
ACTIVE = np.random.default_rng(3).random((2, LENGTH, HEADS)) < 0.5


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Has the chunked forms cut these sequences as they cut long ones."""
    from plait.kernels.attention import chunked, masses

    monkeypatch.setattr(chunked, "DENSE_TILE", 0)
    monkeypatch.setattr(chunked, "BLOCK_SIZE", 8)
    monkeypatch.setattr(masses, "MAX_TILE", 7 * LENGTH)
    _attention.cache_clear()
    yield
    _attention.cache_clear()


@cache
def _attention(kind: str, implementation: str) -> Any:
    """All that the attention ops give of (q, k, v) at segment ids."""
    mask, given = KINDS[kind]
    options: dict[str, Any] = {"mask": mask, "logit_soft_cap": given.get("soft_cap")}
    bias = given.get("bias")
    if "sigmoid_bias" in given:
        options |= {"normalizer": "sigmoid", "sigmoid_bias": given["sigmoid_bias"]}
    if "selected" in given:
        indices, size = given["selected"]
        options["selected"] = SelectedBlocks(indices=jnp.asarray(indices), block_size=size, num_blocks=-(-LENGTH // size))
    sinks = {"sinks": jnp.asarray(given["sinks"])} if "sinks" in given else {}

    @cases.quick_jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        named = options | {"at": Tokens(None, ids)}
        if bias is not None:
            named["bias"] = LowRankBias(*map(jnp.asarray, bias))
            k, v = (jnp.repeat(x, HEADS, axis=2) for x in (k, v))  # this bias is by head
        o, stats = attention(q, k, v, return_stats=True, implementation=implementation, **named, **sinks)
        found = {"o": o, **stats._asdict(), "first_masses": first_masses(q, k, stats.lse, first_k=3, **named)}
        found["weights"] = attention_rows(q, k, jnp.arange(LENGTH), **named, **sinks)
        if "sigmoid_bias" not in given:
            found["column_mass"] = column_mass(q, k, stats.lse, implementation=implementation, **named)
        if "selected" not in given and "sigmoid_bias" not in given:
            found["routed"] = routed_attention(q, k, v, jnp.asarray(ACTIVE), implementation=implementation, **named, **sinks)
        return found

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_attention_is_the_loop(implementation: str, kind: str, small_blocks: None):
    mask, options = KINDS[kind]
    for layout in LAYOUTS:
        ids = _ids(layout)
        found = _attention(kind, implementation)(*INPUTS, ids)
        expected = loops.attention(*INPUTS, ids, mask, **options)
        expected["routed"] = np.where(ACTIVE[..., None], expected["o"], 0)
        for name, got in found.items():
            want = expected[name]
            hidden = want < -1e29
            np.testing.assert_array_equal(np.asarray(got) < -1e29, hidden, err_msg=f"{layout} {name}")
            assert_close(np.where(hidden, 0, got), np.where(hidden, 0, want), dtype="float32", err_msg=f"{layout} {name}")


@pytest.mark.parametrize("positions", ["derived", "given"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_long_prompts_keep_their_sink_tokens_behind_left_padding(implementation: str, positions: str):
    """Beyond one dense tile: what stands before a block's window is found wherever the prompt begins, its statistics too."""
    rows = [(40, 600), (300, 340), (0, 640)]
    ids = np.stack([np.repeat([0, 7], row) for row in rows]).astype(np.int32)
    at = Tokens(None, jnp.asarray(ids), jnp.asarray(np.stack([np.maximum(np.arange(640) - n, 0) for n, _ in rows]), jnp.int32))
    at = at if positions == "given" else dataclasses.replace(at, positions=None)
    q, k, v = (_random(3, 640, 1, DIM, seed=seed) for seed in range(3))
    mask = Mask(window_size=16, num_sink_tokens=3)

    @cases.quick_jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        o, stats = attention(q, k, v, mask=mask, at=at, return_stats=True, implementation=implementation)
        return {"o": o, **stats._asdict()}

    found, expected = run(q, k, v), loops.attention(q, k, v, ids, mask)
    for name, got in found.items():
        assert_close(
            np.where(ids[..., None] == 0, 0, got.reshape(3, 640, -1)),
            np.where(ids[..., None] == 0, 0, expected[name].reshape(3, 640, -1)),
            err_msg=name,
        )


@cache
def _short_conv(implementation: str) -> Any:
    def run(x: jax.Array, weight: jax.Array, bias: jax.Array, before: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = Tokens(None, ids)
        return short_conv(x, weight, bias=bias, initial_state=before, activation=None, at=at, implementation=implementation)

    return cases.quick_jit(run)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_short_conv_is_the_loop(implementation: str, layout: str):
    arguments = _random(2, LENGTH, 3), _random(4, 3, seed=1), _random(3, seed=2), _random(2, 3, 3, seed=3), _ids(layout)
    for got, want in zip(_short_conv(implementation)(*arguments), loops.short_conv(*arguments), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", cases.RECURRENCES)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_recurrences_are_the_loop(implementation: str, name: str):
    x = cases.RECURRENCES[name].inputs(LENGTH)
    for layout in LAYOUTS:
        found = cases.jitted(name, implementation, 8)(x, cases.state(), jnp.asarray(_ids(layout)))
        expected = loops.recurrence(cases.state(), _ids(layout), **x)
        for got, want in zip(found, expected, strict=True):
            assert_close(got, want, err_msg=layout)

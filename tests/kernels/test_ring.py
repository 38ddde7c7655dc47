"""Attention in a ring: outputs, statistics and gradients of one device, in the memory of a part."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import DistanceBias, Mask, Tokens, attention, routed_attention
from plait.kernels.masks import SelectedBlocks
from plait.tests.kernels.test_context import LENGTH, MASKS, SEGMENTS, arrays, assert_same, compiled_text, mesh_of, segment_ids
from plait.tests.suites import usually

ATTENTION = arrays(q=(2, LENGTH, 4, 8), k=(2, LENGTH, 2, 8), v=(2, LENGTH, 2, 6), sinks=(4,))
EVERY = [(mask, segments, n) for mask in MASKS for segments in SEGMENTS for n in (2, 4)]
KEPT = [("causal", "padded", 4), ("full", "packed", 2), ("window and sinks", "packed", 4), ("two-sided", "mostly padding", 4),
        ("power", "one", 2)]  # fmt: skip


def of(mask: str, segments: str, **options: Any):
    """Outputs of attention, and statistics where they are asked for: of those not the largest logit, whose ties break otherwise."""

    def outputs(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = attention(**inputs, mask=MASKS[mask], at=Tokens(None, segment_ids(SEGMENTS[segments])), **options)
        if not options.get("return_stats"):
            return {"o": found}
        o, stats = found
        return {"o": o, "lse": stats.lse, "entropy": stats.entropy, "first": stats.first_mass}

    return outputs


@pytest.mark.parametrize(("mask", "segments", "count"), usually(EVERY, *KEPT))
def test_is_attention_of_one_device(mask: str, segments: str, count: int):
    assert_same(of(mask, segments), ATTENTION, mesh_of(context=count), exchange="ring")


@pytest.mark.parametrize(("mask", "segments", "count"), usually(EVERY, *KEPT[:3]))
def test_statistics_and_their_gradients(mask: str, segments: str, count: int):
    assert_same(of(mask, segments, return_stats=True), ATTENTION, mesh_of(context=count), exchange="ring")

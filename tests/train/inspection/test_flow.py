"""Flow against the smallest of all cuts, rollout against products."""

import itertools

import numpy as np
import pytest

from plait.tests.tolerances import assert_close
from plait.train.inspection.flow import flow, mixing, rollout

RNG = np.random.default_rng(0)


def drawn(*shape):
    a = RNG.uniform(size=(*shape, shape[-1])) * np.tri(shape[-1])
    return a / a.sum(-1, keepdims=True)


def smallest_cut(mixed, source):
    """By trying each set of nodes on the side of the source: what flows to the last token of the last layer at most."""
    depth, size = mixed.shape[:2]
    nodes = list(itertools.product(range(depth + 1), range(size)))
    begin, end = (0, source), (depth, size - 1)
    rest = [node for node in nodes if node not in (begin, end)]
    best = np.inf
    for inside in itertools.product((False, True), repeat=len(rest)):
        near = {begin, *itertools.compress(rest, inside)}
        cut = sum(mixed[n, t, s] for n, t, s in np.ndindex(mixed.shape) if (n, s) in near and (n + 1, t) not in near)
        best = min(best, cut)
    return best


@pytest.mark.parametrize(("depth", "size"), [(1, 4), (2, 3), (3, 2)])
def test_flow_is_the_smallest_cut(depth, size):
    mixed = drawn(depth, size)
    cuts = np.array([smallest_cut(mixed, source) for source in range(size)])
    assert_close(np.float32(flow(mixed)), np.float32(cuts / cuts.sum()))


def test_rollout_is_the_last_row_of_the_product():
    mixed = drawn(4, 5)
    assert_close(np.float32(rollout(mixed)), np.float32((mixed[3] @ mixed[2] @ mixed[1] @ mixed[0])[-1]))


def test_layers_mix_by_the_mean_of_heads_that_have_attention_up_to_the_first_layer_without():
    maps = drawn(3, 2, 4)
    maps[1, 1] = np.nan
    maps[2] = np.nan
    mixed = mixing(maps)
    means = np.stack([maps[0].mean(0), maps[1, 0]])
    assert_close(np.float32(mixed), np.float32((means + np.eye(4)) / 2))
    assert mixing(maps[2:]).shape == (0, 4, 4)


def test_a_stack_of_sinks():
    """Three layers that look at the first token alone: the product leaves the last token an eighth of itself. The way through its own place
    is half as wide as a token; from the first one as much comes at each layer, so that it could fill the last token."""
    first = np.zeros((3, 1, 5, 5))
    first[..., 0] = 1
    mixed = mixing(first)
    assert_close(np.float32(rollout(mixed)), np.float32([7 / 8, 0, 0, 0, 1 / 8]))
    assert_close(np.float32(flow(mixed)), np.float32([2 / 3, 0, 0, 0, 1 / 3]))

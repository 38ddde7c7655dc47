"""PowerAttention: its mask by hand, and how far depth reaches."""

import jax
import numpy as np
import pytest
from flax import nnx

from plait.kernels import PowerMask
from plait.models.build import BuildContext
from plait.models.mixers.sparse.power import PowerConfig
from plait.tests.models.common import layout, quick_jit


def visible(mask: PowerMask, *documents: int, length: int) -> np.ndarray:
    at = layout(documents, length=length)
    return np.asarray(mask.dense(at.positions, at.positions, at.segment_ids, at.segment_ids))[0]


@pytest.mark.proves("power")
def test_mask_by_hand():
    """Blocks of two: a query sees the blocks 0, 1, 2 and 4 before its own, up to itself."""
    rows = [
        "1.........",
        "11........",
        "111.......",
        "1111......",
        "11111.....",
        "111111....",
        "..11111...",
        "..111111..",
        "11..11111.",
        "11..111111",
    ]
    expected = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(visible(PowerMask(block_size=2), 10, length=10), expected)
    packed = visible(PowerMask(block_size=2), 3, 10, length=13)  # blocks are counted inside each document
    np.testing.assert_array_equal(packed[3:, 3:], expected)
    assert not packed[3:, :3].any()


@pytest.mark.proves("power")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_reaches_every_block_less_than_two_to_its_power_back(depth):
    """The layers themselves, one on the other: which inputs the last token's output depends on."""
    length, size = 64, 2
    ctx = BuildContext(rngs=nnx.Rngs(0), seq_len=length)
    graph, state = nnx.split(PowerConfig(num_heads=1, head_dim=8, block_size=size).build(8, ctx))

    def last(x):
        mixer = nnx.merge(graph, state)
        for _ in range(depth):
            x = x + mixer(x, at=layout((length,), length=length), carry={}).y
        return x[0, -1].sum()

    x = jax.random.normal(jax.random.key(0), (1, length, 8))
    reached = (np.asarray(quick_jit(jax.grad(last))(x))[0] != 0).any(-1)
    back = (length - 1) // size - np.arange(length) // size
    assert reached[back < 2**depth].all()
    sums = {0}
    for _ in range(depth):
        sums |= {one + jump for one in sums for jump in (0, 1, 2, 4, 8, 16)}
    np.testing.assert_array_equal(reached, np.isin(back, list(sums)))

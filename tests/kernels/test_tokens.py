"""What is known of each position: filling in, and travelling through transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Tokens, attention, chunking, decay, short_conv
from plait.kernels.masks import Mask
from plait.tests.tolerances import assert_close

IDS = jnp.asarray([[0, 1, 1, 0, 1, 2, 2, 0]], jnp.int32)


def test_missing_fields_are_filled_in():
    one = Tokens().placed(2, 3)
    np.testing.assert_array_equal(one.segment_ids, np.ones((2, 3)))
    np.testing.assert_array_equal(one.positions, [[0, 1, 2]] * 2)
    packed = Tokens(segment_ids=IDS).placed(1, 8)
    real = np.asarray(IDS[0]) != 0
    np.testing.assert_array_equal(packed.positions[0][real], [0, 1, 3, 0, 1])  # padding inside a segment takes up its place
    np.testing.assert_array_equal(packed.starts()[0], [0, 1, 1, 1, 1, 5, 5, 5])
    np.testing.assert_array_equal(packed.numbered()[0], IDS[0])
    np.testing.assert_array_equal(Tokens(None, 7 * (3 - IDS) % 21).numbered(), [[0, 1, 1, 0, 1, 2, 2, 0]])
    given = Tokens(positions=IDS).placed(1, 8)
    np.testing.assert_array_equal(given.positions, IDS)
    np.testing.assert_array_equal(given.segment_ids, np.ones((1, 8)))
    np.testing.assert_array_equal(packed.stacked(), np.stack([packed.segment_ids, packed.positions], 1))


def test_tokens_are_a_pytree_that_ops_take_whole():
    """Vocabulary entries make no difference, and neither does passing through jit."""
    q, x = jnp.cos(jnp.arange(64.0)).reshape(1, 8, 2, 4), jnp.sin(jnp.arange(24.0)).reshape(1, 8, 3)
    at = Tokens(jnp.arange(8)[None], IDS)

    def run(at: Tokens | None) -> tuple[jax.Array, ...]:
        return (
            attention(q, q, q, mask=Mask(), at=at),
            decay(q, q, q, -(q[..., 0] ** 2), at=at)[0],
            short_conv(x, x[0, :3], at=at)[0],
        )

    for got, want in zip(jax.jit(run)(at), run(Tokens(None, IDS)), strict=True):
        assert_close(got, want)
    for got, want in zip(run(Tokens(at.ids)), run(None), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("length", [1, 4096, 4097, 70_001])
def test_running_max_and_sum_are_numpys(length: int):
    x = np.random.default_rng(0).integers(-5, length, (2, length)).astype(np.int32)
    assert (np.asarray(chunking.running_max(jnp.asarray(x))) == np.maximum.accumulate(x, axis=1)).all()
    assert (np.asarray(chunking.running_sum(jnp.asarray(x))) == np.cumsum(x, axis=1, dtype=np.int32)).all()


@pytest.mark.parametrize("length", [1, 64, 65, 5000])
def test_segment_max_is_numpys(length: int):
    rng = np.random.default_rng(0)
    x, index = rng.random((2, length, 3)).astype(np.float32), np.cumsum(rng.random((2, length)) < 0.02, axis=1)
    want = x.copy()
    for t in range(1, length):
        want[:, t] = np.where((index[:, t] == index[:, t - 1])[:, None], np.maximum(want[:, t - 1], x[:, t]), x[:, t])
    np.testing.assert_array_equal(chunking.segment_max(jnp.asarray(x), jnp.asarray(index)), want)

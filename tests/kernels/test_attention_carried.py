"""The sums that TPU attention carries to the core and back, under the TPU interpreter with race detection: every order of blocks adds up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from plait.kernels.attention.tpu import carried
from plait.tests.kernels.attention_calls import run_checked

BATCH, HEADS, WIDTH, BLOCKS, SIZE = 2, 2, 8, 4, 128
STEPS = 20


def _kernel(table, _, far, *scratch):
    b, n = pl.program_id(0), pl.program_id(1)
    place = lambda m: carried.Place(table[3 * m], table[3 * m + 1], table[3 * m + 2] != 0)
    sums = carried.Carried(far.at[b], *scratch, place=place, n=n, count=pl.num_programs(1))
    sums.enter()

    @pl.when(sums.place.adds)
    def _add():
        sums.here[...] += jnp.full((WIDTH, SIZE), n + 1, jnp.float32)

    sums.leave()


@jax.jit
def _sums(table: jax.Array, count: jax.Array) -> jax.Array:
    """Runs so many steps of the heads, blocks and whether they add that stand in a table: the n-th adds n + 1, from zeros."""
    shape = BATCH, HEADS, WIDTH, BLOCKS * SIZE
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(BATCH, count),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=carried.scratch(WIDTH, SIZE),
        ),
        input_output_aliases={1: 0},
    )(table, jnp.zeros(shape, jnp.float32))


def _windows(width: int, heads: int) -> np.ndarray:
    """Blocks of keys in turn, each met by so many blocks of queries of each head."""
    blocks = [(j, i) for j in range(BLOCKS) for i in range(j, min(j + width, BLOCKS))]
    return np.array([(h, i, 1) for _, i in blocks for h in range(heads)])


CASES = {
    **{f"window-{width}-{heads}": _windows(width, heads) for width, heads in itertools.product((1, 2, 3), (1, 2))},
    "one": np.array([(1, 2, 1)]),
    "nothing": np.array([(0, 0, 0)] * 3),
    "around-nothing": np.array([(0, 1, 0), (0, 1, 1), (0, 1, 0), (0, 1, 1), (0, 0, 0), (0, 2, 1), (0, 1, 1), (0, 1, 0)]),
    **{f"random-{seed}": np.random.default_rng(seed).integers(0, (HEADS, BLOCKS, 3), (STEPS, 3)) for seed in range(2)},
}


@pytest.mark.parametrize("name", CASES)
def test_every_order_adds_up(name: str):
    steps = CASES[name]
    expected = np.zeros((HEADS, BLOCKS))
    for n, (head, block, adds) in enumerate(steps):
        expected[head, block] += (n + 1) * (adds != 0)
    table = np.zeros((STEPS, 3), np.int32)
    table[: len(steps)] = steps
    got = np.asarray(run_checked(_sums, jnp.asarray(table.reshape(-1)), jnp.int32(len(steps))))
    got = got.reshape(BATCH, HEADS, WIDTH, BLOCKS, SIZE)
    np.testing.assert_array_equal(got, np.broadcast_to(expected[None, :, None, :, None], got.shape))

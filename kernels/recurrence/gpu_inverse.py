"""The inverse that solves a chunk of the delta rule for what its tokens write, inside a Hopper kernel.

With L_ij = beta_i A_ij of the scores A of keys (j < i), X = (I + L)^-1 is built by halves, as in `plait.kernels.chunking`: where X
inverts the diagonal blocks and B is L between the halves of the next larger ones, these are inverted by X - X B X. All factors are
split into three bfloat16 terms, which is all of float32: where keys resemble each other the products are sums of large terms of both
signs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from plait.kernels.recurrence.gpu_chunk import HALVINGS, SQUARE, Ref, halving, load, matmul, store, terms, tokens

Array = jax.Array

TERMS = 3
"""Of the inverse."""


def invert(lower: Ref, inverse: Sequence[Ref], block: Sequence[Ref], product: Sequence[Ref]) -> None:
    """Leaves (I + L)^-1 in the three tiles `inverse`, of L [C, C] in shared memory, read where j < i; the others are scratch."""
    row, column = tokens()
    store(jnp.where(row == column, 1.0, 0.0), *inverse)

    @pl.loop(0, HALVINGS)
    def _halve(level: Array) -> None:
        store(jnp.where(halving(jnp.int32(1) << level, *tokens()), load(lower), 0.0), *block)
        plgpu.commit_smem()
        store(matmul(SQUARE, *terms(block, inverse)), *product)
        plgpu.commit_smem()
        correction = matmul(SQUARE, *terms(inverse, product))
        plgpu.commit_smem()  # No warp still reads what is written next.
        store(sum(map(load, inverse), start=-correction), *inverse)

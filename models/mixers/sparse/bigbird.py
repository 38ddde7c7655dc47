"""BigBird: blocks near a query, the first ones of its document, and some drawn at random."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Seed, Whole
from plait.kernels import SelectedBlocks
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.full.by_rule import MultiHead
from plait.models.mixers.sparse.selecting import BlocksConfig

SomeBlocks = Annotated[int, Whole(0, 2**20)]


@register(
    "bigbird",
    kind="sparse",
    source="Big Bird: Transformers for Longer Sequences (2007.14062)",
    proof="window, global and random blocks by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBirdConfig(BlocksConfig):
    """Softmax attention to the `num_window_blocks` blocks up to the query's own, the first `num_global_blocks` of its document, and
    `num_random_blocks` of those in between.

    The causal form of the paper's block pattern, which has a block on either side for its window, and whose global blocks, the first and
    the last, also see all: looking back, a window ends at the query, the first tokens see what is before them as any do, and a last block
    is nobody's past. The draw is of a key head, a query's block and the seed alone: a document draws the same wherever it stands, layers
    of one name draw the same, and blocks are drawn without putting back.
    """

    num_window_blocks: Annotated[int, Whole(1, 2**20)] = 2
    """Blocks up to the query's own, which is one of them; the published three are its own and one on either side."""
    num_global_blocks: SomeBlocks = 1
    """Leading blocks of the document."""
    num_random_blocks: SomeBlocks = 3
    """Blocks drawn of those between, a key head by itself; all of them where they are fewer."""
    seed: Seed = 0
    """What they are drawn with."""

    @classmethod
    def example(cls) -> BigBirdConfig:
        return cls(num_heads=4, num_kv_heads=2, head_dim=16, block_size=4)

    def build(self, d_model: int, ctx: BuildContext) -> BigBird:
        return BigBird(self, d_model, ctx)

    def between(self, own: int) -> range:
        """The blocks of which those seen from block `own` are drawn."""
        return range(self.num_global_blocks, max(self.num_global_blocks, own - self.num_window_blocks + 1))

    def whole_blocks(self, own: np.ndarray) -> np.ndarray:
        window = np.minimum(self.num_window_blocks - 1, own)
        apart = own - window  # blocks before the window
        first = np.minimum(self.num_global_blocks, apart)
        return window + first + np.minimum(self.num_random_blocks, apart - first)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.pair_flops(d_model) * self.seen_keys(d_model, seq_len)


@functools.lru_cache(maxsize=32)
def blocks_of(config: BigBirdConfig, num_kv_heads: int, num_blocks: int) -> np.ndarray:
    """int32 `[num_blocks, Hkv, N]`: which blocks are seen from each, -1 where there are fewer."""
    count = config.num_window_blocks + config.num_global_blocks + config.num_random_blocks
    table = np.full((num_blocks, num_kv_heads, min(count, num_blocks)), -1, np.int32)
    for own in range(num_blocks):
        near = range(max(0, own - config.num_window_blocks + 1), own + 1)
        fixed = [*near, *range(min(config.num_global_blocks, near[0]))]
        between = config.between(own)
        for head in range(num_kv_heads):
            draw = np.random.default_rng((config.seed, head, own))
            seen = [*fixed, *draw.permutation(len(between))[: config.num_random_blocks] + config.num_global_blocks]
            table[own, head, : len(seen)] = seen
    return table


class BigBird(MultiHead):
    """See `BigBirdConfig`."""

    def options(self, inputs, at):
        size, count = self.config.block_size, -(-inputs.k.shape[1] // self.config.block_size)
        own = jnp.clip(at.positions // size, 0, count - 1)
        indices = jnp.asarray(blocks_of(self.config, self.num_kv_heads, count))[own]
        return {**super().options(inputs, at), "selected": SelectedBlocks(indices=indices, block_size=size, num_blocks=count)}

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

"""What sparse mixers share whose queries choose blocks of keys: one op to choose, one to attend, and a cache that keeps the sums of the
keys of each block beside the tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Span, Whole
from plait.kernels import SelectedBlocks, Tokens, whole_blocks
from plait.models.axes import BATCH, KV_HEADS, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache, current
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig

Blocks = Annotated[int, Whole(1, 2**20)]
"""Blocks that a query sees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksConfig(GroupedConfig, abc.ABC):
    """Of one width, whose keys and values are shared by groups of heads, and whose queries see blocks of their document, their own and
    whole ones before it."""

    directions = ("causal",)

    block_size: Span = 64
    """Tokens a block, counted from the start of the document."""

    @abc.abstractmethod
    def whole_blocks(self, own: np.ndarray) -> np.ndarray:
        """How many blocks before its own a query sees, of the numbers of their own blocks."""

    def pair_flops(self, d_model: int) -> float:
        """Operations of a query and a key, all heads."""
        maps, keys, values = self.maps(d_model)
        return 2.0 * maps * (keys + values)

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        block = np.arange(-(-seq_len // self.block_size))
        tokens = np.minimum(seq_len - block * self.block_size, self.block_size)
        whole = self.whole_blocks(block) * self.block_size
        return float((tokens * (tokens + 1) / 2 + tokens * whole).sum()) / seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectingConfig(BlocksConfig):
    """Whose queries choose those blocks by scores."""

    block_size: Span = 512
    """Tokens a block, counted from the start of the document."""
    top_k: Blocks = 3
    """Blocks that a query sees, its own among them."""

    def check(self) -> None:
        super().check()
        if self.positions is not None and self.positions.place == "logits":
            raise ValueError(
                f"positions={self.positions.name} adds to the logits, and the scores by which blocks are chosen have none; use 'rotary'"
            )

    def whole_blocks(self, own: np.ndarray) -> np.ndarray:
        return np.minimum(self.top_k - 1, own)


def mean_past(seq_len: int, stride: int, span: int) -> float:
    """Of the runs of `span` tokens that begin every `stride`, how many end at a token or before it, the mean over a sequence."""
    ends = np.arange(span, seq_len + 1, stride)  # tokens when each has come to its end
    return float((seq_len + 1 - ends).sum()) / seq_len


class Selectable(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens
    blocks: tuple[jax.Array, Tokens] | None = (
        None  # [B, N, Hkv, K] for the blocks' keys, and where they stand, when those are a cache's
    )


class BlockCache(NamedTuple):
    """What decoding keeps: tokens, and of each block the sum of its keys."""

    tokens: Cache
    sums: jax.Array  # [B, N, Hs, K] float32


class Selecting(DotProduct):
    """Subclasses make their projections, `o` the one back, and write `project` and `select`."""

    config: Any

    def __init__(self, config: SelectingConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.num_heads, self.num_kv_heads = config.heads(d_model)

    @abc.abstractmethod
    def select(self, inputs: Any, at: Tokens) -> SelectedBlocks:
        """The blocks that each query sees."""

    def mean_keys(self, inputs: Any, at: Tokens) -> tuple[jax.Array, Tokens]:
        """The mean key of each block that has come to its end, and where those stand."""
        if inputs.blocks is not None:
            return inputs.blocks
        blocks = whole_blocks(at.placed(*inputs.k.shape[:2]), self.config.block_size)
        return blocks.mean(self.summed(inputs)), blocks.at

    def summed(self, inputs: Any) -> jax.Array:
        """`[B, T, Hs, K]`, the means of which stand for blocks: the keys."""
        return inputs.k

    def sums_shape(self) -> tuple[int, int]:
        """`(Hs, K)` of that."""
        return self.num_kv_heads, self.config.head_dim

    def options(self, inputs, at):
        return {**super().options(inputs, at), "selected": self.select(inputs, at)}

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)  # which tiles a query visits is its blocks' to say

    def init_state(self, batch_size, max_len):
        shape = (batch_size, -(-max_len // self.config.block_size), *self.sums_shape())
        axis = KV_HEADS if shape[2] == self.num_kv_heads else None
        sums = constrain(jnp.zeros(shape, jnp.float32), (BATCH, None, axis, None))
        return BlockCache(super().init_state(batch_size, max_len), sums)

    def attend(self, inputs, *, at, state):
        o = self.weigh(inputs, at=at)
        return o, None if state is None else self.kept_with(state, inputs, at)

    def kept_with(self, state: BlockCache, inputs: Selectable, at: Tokens) -> BlockCache:
        """The cache with the tokens of the inputs."""
        tokens = self.slots.write(state.tokens, self.kept(inputs), at)
        number = jnp.where(current(at), at.positions // self.config.block_size, state.sums.shape[1])  # out of range: dropped
        row = jnp.arange(number.shape[0])[:, None]
        added = self.summed(inputs).astype(tokens.entries["k"].dtype).astype(state.sums.dtype)
        return BlockCache(tokens, state.sums.at[row, number].add(added, mode="drop"))

    def recall(self, inputs, carry, *, at, state):
        state = self.kept_with(state, inputs, at)
        return self.recalled(inputs, state.tokens)._replace(blocks=self.means(state)), carry, state

    def means(self, state: BlockCache) -> tuple[jax.Array, Tokens]:
        """The mean key of each block of the cache, and where those stand."""
        batch, count = state.sums.shape[:2]
        positions = state.tokens.positions
        there = jnp.pad(positions >= 0, ((0, 0), (0, count * self.config.block_size - positions.shape[1])))
        number = there.reshape(batch, count, -1).sum(-1)
        mean = state.sums / jnp.maximum(number, 1).astype(state.sums.dtype)[..., None, None]
        return mean, Tokens(
            None, (number > 0).astype(jnp.int32), jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        )

    def num_blocks(self, inputs: Any) -> int:
        """Blocks that a document may have among these keys."""
        return -(-inputs.k.shape[1] // self.config.block_size)

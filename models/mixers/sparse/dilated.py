"""Dilated attention (LongNet): segments of growing length, of which ever fewer tokens attend to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from plait.configs.domains import Whole
from plait.kernels import ChunkMask, Tokens, attention, attention_rows
from plait.models.build import BuildContext
from plait.models.layers.cache import Slots
from plait.models.mixers.base import Direction, register
from plait.models.mixers.sparse.masked import Masked, MaskedConfig
from plait.models.positions.base import Position


@register(
    "dilated",
    kind="sparse",
    source="LongNet: Scaling Transformers to 1,000,000,000 Tokens (2307.02486)",
    proof="segments, every r-th row, dense attention and the mixture by denominators, by hand in float64",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DilatedConfig(MaskedConfig):
    """For each pair of a segment length w and a dilation r, softmax attention among every r-th token of each segment of w tokens.

    Key head h takes the tokens h mod r, h mod r + r, ... of a segment, so that the heads together take all. A token that several pairs
    take gets `sum_n a_n o_n`, `a_n = s_n / sum_m s_m`, s_n being the denominator of its softmax in pair n: one softmax over the keys
    of all pairs. A token that a pair leaves out gets nothing from it.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    segment_lengths: tuple[Annotated[int, Whole(1, 2**30)], ...] = (2048, 4096, 8192, 16384, 32768)
    """Tokens a segment, w, of each pair, counted from the start of the document; the paper's, as its dilations."""
    dilations: tuple[Annotated[int, Whole(1, 2**20)], ...] = (1, 2, 4, 6, 12)
    """Of as many tokens of a segment one takes part, r, of each pair."""

    def check(self) -> None:
        super().check()
        count = len(self.segment_lengths)
        if not count or count != len(self.dilations):
            raise ValueError(
                f"dilations={self.dilations} must be as many as segment_lengths={self.segment_lengths}, and at least one; pair them"
            )

    @classmethod
    def example(cls) -> DilatedConfig:
        return cls(num_heads=4, head_dim=16, segment_lengths=(24, 48), dilations=(1, 2))

    def mask(self, num_heads: int, causal: bool) -> ChunkMask:
        """What all pairs lie within."""
        return ChunkMask(causal=causal, chunk_size=max(self.segment_lengths))

    def slots(self) -> Slots:
        return Slots(max(self.segment_lengths))

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        """A key counts in each pair that shows it."""
        _, num_kv_heads = self.heads(d_model)
        return sum(
            _seen(length, dilation, head % dilation, seq_len) / num_kv_heads
            for length, dilation in zip(self.segment_lengths, self.dilations)
            for head in range(num_kv_heads)
        )

    def sees_whole(self, d_model: int, seq_len: int) -> bool:
        return any(length >= seq_len and dilation == 1 for length, dilation in zip(self.segment_lengths, self.dilations))

    def build(self, d_model: int, ctx: BuildContext) -> Dilated:
        return Dilated(self, d_model, ctx)


def _seen(length: int, dilation: int, offset: int, seq_len: int) -> float:
    """Keys that a causal query sees in one pair, the mean over a sequence."""
    whole, rest = divmod(seq_len, length)
    among = lambda tokens: (n := max(0, -(-(tokens - offset) // dilation))) * (n + 1) / 2
    return (whole * among(length) + among(rest)) / seq_len


class Dilated(Masked):
    """See `DilatedConfig`.

    The tokens that a pair takes of a row are gathered at its front, so that kernels meet dense tiles and visit none of the others;
    key heads that take others are rows of a batch of their own.
    """

    config: DilatedConfig

    def __init__(self, config: DilatedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        if self.positions is not None and type(self.positions).bias is not Position.bias:
            raise ValueError(
                "positions must turn or be added, not be a bias on the logits, whose tokens stand closer once others are left out; "
                "use rotary, or leave them out"
            )

    def pairs(self) -> Iterator[Pair]:
        """The pairs of the config."""
        for length, dilation in zip(self.config.segment_lengths, self.config.dilations):
            rows = dilation if self.num_kv_heads % dilation == 0 else self.num_kv_heads
            yield Pair(length, dilation, rows, self.num_kv_heads, self.mask.causal)

    def by_pair(self, inputs: Any, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """The outputs `[N, B, T, H, V]` of the pairs, and the logarithms `[N, B, T, H]` of their denominators."""
        at = at.placed(*inputs.q.shape[:2])
        found = [pair.attend(inputs, at, self.scale) for pair in self.pairs()]
        o, lse = (jnp.stack(parts) for parts in zip(*found))
        return o, lse

    def weigh(self, inputs, *, at):
        o, lse = self.by_pair(inputs, at)
        return jnp.sum(jax.nn.softmax(lse, axis=0)[..., None] * o, axis=0).astype(inputs.q.dtype)

    def attend_active(self, inputs, active, *, at):
        return self.weigh(inputs, at=at)

    def implied(self, inputs, rows, *, at):
        at = at.placed(*inputs.q.shape[:2])
        _, lse = self.by_pair(inputs, at)
        shares = jnp.swapaxes(jax.nn.softmax(lse, axis=0)[:, :, rows], 2, 3)[..., None]  # [N, B, H, R, 1]
        return sum(share * pair.rows_of(inputs, rows, at, self.scale) for share, pair in zip(shares, self.pairs()))

    def observe(self, inputs, x, *, at):
        return {}  # statistics of one pair's softmax are not the row's; probes look at rows


@dataclasses.dataclass(frozen=True)
class Pair:
    """One segment length with its dilation."""

    length: int
    dilation: int
    rows: int
    """Rows of the batch that one becomes; key head h is in row h modulo this."""
    num_kv_heads: int
    causal: bool

    @property
    def mask(self) -> ChunkMask:
        """The mask among the tokens that take part."""
        return ChunkMask(causal=self.causal, chunk_size=-(-self.length // self.dilation))

    def attend(self, inputs: Any, at: Tokens, scale: float) -> tuple[jax.Array, jax.Array]:
        """Outputs `[B, T, H, V]` and log-denominators `[B, T, H]`; without keys, 0 and -1e30."""
        q, k, v = (self.apart(x) for x in inputs[:3])
        queries, keys = self.taken(at), None if inputs.kv_at is None else self.taken(inputs.kv_at)
        if gathered := keys is None and self.dilation > 1:
            order = jnp.argsort(queries.segment_ids == 0, axis=1, stable=True)
            q, k, v, queries = jax.tree.map(lambda x: _pick(x, order), (q, k, v, queries))
        found = attention(q, k, v, mask=self.mask, at=queries, kv_at=keys, scale=scale, return_lse=True)
        if gathered:
            found = jax.tree.map(lambda x: _pick(x, jnp.argsort(order, axis=1)), found)
        o, lse = map(self.together, found)
        return o, lse

    def rows_of(self, inputs: Any, rows: jax.Array, at: Tokens, scale: float) -> jax.Array:
        """Rows `[B, H, R, S]` of its weights."""
        q, k = (self.apart(x) for x in inputs[:2])
        weights = attention_rows(q, k, rows=rows, mask=self.mask, at=self.taken(at), scale=scale)  # [B n, H / n, R, S]
        return jnp.moveaxis(self.together(jnp.moveaxis(weights, 1, 2)), 2, 1)

    def taken(self, at: Tokens) -> Tokens:
        """The tokens `[B n, T]` by row, those that take no part as padding; a segment's are numbered on from the one before."""
        segment, local = at.positions // self.length, at.positions % self.length
        offset = (jnp.arange(self.rows) % self.dilation)[None, :, None]
        part = (local[:, None] % self.dilation == offset) & (at.segment_ids[:, None] > 0)
        ids = jnp.where(part, at.segment_ids[:, None], 0).reshape(-1, local.shape[1])
        places = segment * self.mask.chunk_size + local // self.dilation
        return Tokens(None, ids, jnp.repeat(places, self.rows, axis=0))

    def apart(self, x: jax.Array) -> jax.Array:
        """`[B, T, H, ...]` to `[B n, T, H / n, ...]`."""
        batch, length, heads, *rest = x.shape
        x = x.reshape(batch, length, self.num_kv_heads // self.rows, self.rows, heads // self.num_kv_heads, *rest)
        return jnp.moveaxis(x, 3, 1).reshape(batch * self.rows, length, heads // self.rows, *rest)

    def together(self, x: jax.Array) -> jax.Array:
        """The inverse of `apart`."""
        rows, length, heads, *rest = x.shape
        groups = self.num_kv_heads // self.rows
        x = x.reshape(rows // self.rows, self.rows, length, groups, heads // groups, *rest)
        return jnp.moveaxis(x, 1, 3).reshape(rows // self.rows, length, heads * self.rows, *rest)


def _pick(x: jax.Array, order: jax.Array) -> jax.Array:
    """The tokens of `x` `[B, T, ...]` in this order `[B, T]`."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

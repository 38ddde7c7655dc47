"""What full mixers share whose weights are a softmax of dot products: one op, a cache of what keys and values are made of, and the
projection back. A mixer is then its config and how it makes, shares and combines queries, keys and values.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax

from plait.configs.components import at as under
from plait.configs.domains import Channels, Heads
from plait.kernels import Tokens, attention, attention_rows, column_mass, first_masses, routed_attention
from plait.kernels.attention.bias import folded_columns
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.looks.look import Selection
from plait.models.mixers.base import Direction, MixerConfig
from plait.models.mixers.full.weighted import Cached, mean_keys
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.positions.base import Position, PositionConfig
from plait.models.positions.rotary import RotaryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DotProductConfig(MixerConfig, abc.ABC):
    """Heads that weigh values by a softmax of scaled dot products."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    @abc.abstractmethod
    def count_heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""

    @abc.abstractmethod
    def maps(self, d_model: int) -> tuple[int, int, int]:
        """How many softmaxes, and the channels of their keys and values."""

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        maps, keys, values = self.maps(d_model)
        return 2.0 * maps * (keys + values) * mean_keys(seq_len)

    def place(self, ctx: BuildContext, d_model: int) -> Position | None:
        """The position encoding."""
        return None

    def fit_length(self, length: int) -> None:
        """Raises ValueError where sequences of `length` cannot be decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig(DotProductConfig):
    """Of one width."""

    num_heads: Heads | None = None
    """Heads; None gives d_model / head_dim."""
    head_dim: Channels = 64
    """Channels of a head."""

    def count_heads(self, d_model: int) -> int:
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def maps(self, d_model: int) -> tuple[int, int, int]:
        return self.count_heads(d_model), self.head_dim, self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionsConfig(DotProductConfig):
    """With a choice of position encodings."""

    positions: PositionConfig | None = RotaryConfig()
    """How queries and keys know where they stand; None for no position encoding (NoPE)."""

    def place(self, ctx: BuildContext, d_model: int) -> Position | None:
        if self.positions is None:
            return None
        return under("positions", self.positions.build, ctx, d_model, self.maps(d_model)[0])

    def fit_length(self, length: int) -> None:
        if self.positions is not None:
            under("positions", self.positions.fit_length, length, "decoding")

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        maps, keys, _ = self.maps(d_model)
        rank = 0 if self.positions is None else self.positions.bias_rank
        folded = folded_columns(rank, keys) if rank else 0
        return super().mixing_flops(d_model, seq_len) + 2.0 * maps * folded * mean_keys(seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedConfig(PositionsConfig, HeadsConfig):
    """Of one width, with a choice of position encodings."""

    def check(self) -> None:
        if self.positions is not None:
            under("positions", self.positions.fit, self.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedConfig(PlacedConfig):
    """Whose keys and values are shared by groups of heads."""

    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads; None gives num_heads."""

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = self.count_heads(d_model)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads


class DotProduct(Cached):
    """Subclasses make their projections, `o` the one back, and write `project`; those that cache other things than keys and values
    also `entries`, `kept` and `recalled`.
    """

    config: Any
    num_kv_heads: int
    o: Any

    def __init__(self, config: DotProductConfig, d_model: int, ctx: BuildContext):
        super().__init__(ctx)
        self.config, self.num_heads = config, config.count_heads(d_model)
        self.scale = config.maps(d_model)[1] ** -0.5
        self.positions = config.place(ctx, d_model)

    @staticmethod
    def projection(ctx: BuildContext, d_model: int, heads: int, channels: int, axis: str = HEADS) -> Dense:
        """A projection to heads."""
        return Dense(ctx, d_model, heads * channels, (EMBED, axis), heads=(1, heads))

    def projection_back(self, ctx: BuildContext, d_model: int, channels: int) -> Dense:
        """The projection of the finished heads to the residual stream."""
        width = self.num_heads * channels
        return Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    @staticmethod
    def split(y: jax.Array, heads: int, axis: str = HEADS) -> jax.Array:
        """`[B, T, H * K]` to `[B, T, H, K]`, laid out by head."""
        return constrain(split_heads(y, heads), (BATCH, LENGTH, axis, None))

    def placed(self, x: jax.Array, at: Tokens) -> jax.Array:
        """`x` `[B, T, D]`, from which queries and keys are projected, with positions."""
        return x if self.positions is None else self.positions.add(x, at)

    def turned(self, heads: jax.Array, at: Tokens) -> jax.Array:
        """Queries or keys `[B, T, H, K]` with positions."""
        return heads if self.positions is None else self.positions.turn(heads, at)

    def options(self, inputs: Any, at: Tokens) -> dict[str, Any]:
        """Arguments of the ops."""
        kv_at = at if inputs.kv_at is None else inputs.kv_at
        bias = None if self.positions is None else self.positions.bias(at, kv_at, scale=self.scale)
        return {"mask": self.mask, "scale": self.scale, "bias": bias}

    def entries(self):
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return {"k": one, "v": one}

    def init_state(self, batch_size, max_len):
        self.config.fit_length(max_len)
        return super().init_state(batch_size, max_len)

    def weigh(self, inputs, *, at):
        return attention(inputs.q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, **self.options(inputs, at))

    def attend_active(self, inputs, active, *, at):
        return routed_attention(inputs.q, inputs.k, inputs.v, active, at=at, **self.options(inputs, at))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs, at))

    def observe(self, inputs, x, *, at):
        options = {**self.options(inputs, at), "at": at}
        _, stats = attention(inputs.q, inputs.k, inputs.v, return_stats=True, **options)
        masses = {
            op.__name__: functools.partial(op, inputs.q, inputs.k, stats.lse, **options) for op in (first_masses, column_mass)
        }
        found = {"attention": stats, "logits": (inputs.q, inputs.k, self.scale), **masses}
        if (selected := options.pop("selected", None)) is not None:
            found["selection"] = Selection(selected, functools.partial(attention_rows, inputs.q, inputs.k, **options))
        return found

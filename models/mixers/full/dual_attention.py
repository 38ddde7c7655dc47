"""Sensory heads, which gather what tokens are, beside relational heads, which gather how tokens relate."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.components import at as under
from plait.configs.domains import Heads, Vocabulary
from plait.kernels import Tokens, attention, attention_rows
from plait.kernels.attention.bias import folded_columns
from plait.models.axes import EMBED, HEADS, KV_HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.base import HeadMixer, register
from plait.models.mixers.full.dot_product import DotProduct, DotProductConfig
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.heads import join_heads, require_divides, split_heads
from plait.models.positions.base import Position, PositionConfig
from plait.models.positions.rotary import RotaryConfig


@register(
    "dual_attention",
    kind="full",
    source="Disentangling and Integrating Relational and Sensory Information in Transformers (2405.16727)",
    proof="the authors' layer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DualAttentionConfig(DotProductConfig):
    """Sensory heads `sum_j A_ij v_j` and relational heads `sum_j A_ij (W_r r_ij + W_s s_j)`, each kind with its own projection back.

    `r_ij` has for every relation l the number `(x_i Q_l) . (x_j K_l) / sqrt(P)`, P = head_dim relational heads / relations; s_j is the
    symbol of token j, read from a learned library by its own attention over templates: `s_j = softmax(W x_j T^T / sqrt(K)) S`.

    A sum over j of `A_ij r_ij` is the relation of x_i with `sum_j A_ij x_j K_l`: values that are wider by head_dim relational heads,
    and no array of pairs. Relations have no activation (the default of the authors' code), since no other allows that, and every layer
    has a library of its own. Symbols by distance, which that code also has, are no weighted sums of values and not here. Heads are
    d_model / num_heads wide.
    """

    num_heads: Heads = 16
    """Heads of both kinds, a divisor of d_model."""
    num_relational_heads: Heads | None = None
    """How many of them are relational; None gives half."""
    num_kv_heads: Heads | None = None
    """Key and value heads of each kind, a divisor of its heads; None gives as many as heads."""
    num_relations: Heads | None = None
    """Relations of two tokens; None gives as many as relational heads."""
    symmetric: bool = False
    """`r_ij = r_ji`: Q_l and K_l are one matrix."""
    num_symbols: Vocabulary = 1024
    """Entries of the library of symbols."""
    symbol_heads: Heads = 8
    """Heads of the attention that reads the library, a divisor of d_model."""
    positions: PositionConfig | None = RotaryConfig()
    """How the queries and keys that weigh tokens know where they stand; None for no position encoding (NoPE)."""

    @classmethod
    def example(cls) -> DualAttentionConfig:
        return cls(num_heads=4, num_relations=8, num_symbols=12, symbol_heads=2)

    def count_heads(self, d_model: int) -> int:
        sensory, relational, channels = self.split(d_model)
        if sensory < 1:
            raise ValueError(
                f"num_relational_heads={relational} must leave a sensory head of num_heads={self.num_heads}; "
                f"use {self.num_heads - 1} or less"
            )
        for name, heads in (("num_heads - num_relational_heads", sensory), ("num_relational_heads", relational)):
            require_divides(("num_kv_heads", self.num_kv_heads or heads), (name, heads))
        require_divides(("num_relations", self.relations), ("num_relational_heads * head_dim", relational * channels))
        require_divides(("symbol_heads", self.symbol_heads), ("d_model", d_model))
        if self.positions is not None:
            under("positions", self.positions.fit, channels)
        return self.num_heads

    def maps(self, d_model: int) -> tuple[int, int, int]:
        sensory, _, channels = self.split(d_model)
        return sensory, channels, channels

    def place(self, ctx: BuildContext, d_model: int, kind: Literal["sensory", "relational"] = "sensory") -> Position | None:
        """The position encoding of a kind of heads."""
        if self.positions is None:
            return None
        return under("positions", self.positions.build, ctx, d_model, self.split(d_model)[kind == "relational"])

    def fit_length(self, length: int) -> None:
        if self.positions is not None:
            under("positions", self.positions.fit_length, length, "decoding")

    def split(self, d_model: int) -> tuple[int, int, int]:
        """`(sensory heads, relational heads, channels of a head)` at width `d_model`."""
        require_divides(("num_heads", self.num_heads), ("d_model", d_model))
        relational = self.num_relational_heads or self.num_heads // 2
        return self.num_heads - relational, relational, d_model // self.num_heads

    @property
    def relations(self) -> int:
        """Relations of two tokens."""
        return self.num_relations or self.num_relational_heads or self.num_heads // 2

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        _, relational, channels = self.split(d_model)
        related = relational * channels
        rank = 0 if self.positions is None else self.positions.bias_rank
        both = self.num_heads * (2 * channels + (folded_columns(rank, channels) if rank else 0))
        return 2.0 * (both + relational * related) * mean_keys(seq_len) + 2.0 * relational * related

    def build(self, d_model: int, ctx: BuildContext) -> DualAttention:
        return DualAttention(self, d_model, ctx)


class Dual(NamedTuple):
    """Inputs of the two kinds; those of the relational heads have names with `r_`."""

    q: jax.Array  # [B, T, Hs, K]
    k: jax.Array  # [B, S, Hkv, K]
    values: jax.Array  # [B, S, Hkv, K]
    r_q: jax.Array  # [B, T, Hr, K]
    r_k: jax.Array  # [B, S, Hkv, K]
    symbols: jax.Array  # [B, S, Hkv, K], W_s s
    related: jax.Array  # [B, S, L * P], x K_l of all relations
    relating: jax.Array  # [B, T, L * P], x Q_l of all relations
    kv_at: Tokens | None = None

    @property
    def r_v(self) -> jax.Array:
        """What relational heads weigh, `[B, S, Hkv, K + L * P]`."""
        related = jnp.broadcast_to(self.related[:, :, None], (*self.symbols.shape[:3], self.related.shape[-1]))
        return jnp.concatenate([self.symbols, related], axis=-1)

    @property
    def v(self) -> jax.Array:
        """What all heads weigh, `[B, S, H, K + L * P]`, sensory ones filled up with zeros."""
        sensory, relational = (
            jnp.repeat(v, q.shape[2] // v.shape[2], axis=2) for q, v in ((self.q, self.values), (self.r_q, self.r_v))
        )
        return _joined(sensory, relational)


def _joined(sensory: jax.Array, relational: jax.Array) -> jax.Array:
    """Heads of both kinds, the narrow first ones filled up with zeros."""
    filling = relational.shape[-1] - sensory.shape[-1]
    return jnp.concatenate([jnp.pad(sensory, ((0, 0), (0, 0), (0, 0), (0, filling))), relational], axis=2)


class DualAttention(DotProduct):
    """See `DualAttentionConfig`. Sensory heads are the first ones."""

    def __init__(self, config: DualAttentionConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        self.r_positions = config.place(ctx, d_model, "relational")
        self.sensory, self.relational, self.channels = config.split(d_model)
        self.kv = config.num_kv_heads or self.sensory, config.num_kv_heads or self.relational
        project = lambda heads, axis=HEADS: self.projection(ctx, d_model, heads, self.channels, axis)
        self.q, self.r_q = project(self.sensory), project(self.relational)
        self.k, self.v, self.r_k, self.r_v = (project(self.kv[i], KV_HEADS) for i in (0, 0, 1, 1))
        related, bound = self.relational * self.channels, (self.channels * config.relations) ** -0.5
        self.relating = Dense(ctx, d_model, related, (EMBED, None), heads=(1, config.relations))
        self.related = None if config.symmetric else Dense(ctx, d_model, related, (EMBED, None), heads=(1, config.relations))
        self.of_relations = Dense(
            ctx,
            config.relations,
            self.channels,
            (HEADS, None, None),
            lead=(self.relational,),
            init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        )
        self.symbol_query = Dense(ctx, d_model, d_model, (EMBED, None), use_bias=True)
        library = (config.num_symbols, d_model)
        self.templates, self.library = (
            ctx.param(jax.nn.initializers.normal(1.0), library, (None, EMBED), role="embedding") for _ in range(2)
        )
        back = lambda width, heads: Dense(ctx, width, width, (HEADS, EMBED), init=ctx.residual_init, heads=(0, heads))
        self.o, self.r_o = back(self.sensory * self.channels, self.sensory), back(related, self.relational)

    def symbols(self, x: jax.Array) -> jax.Array:
        """The symbol of each token, `[B, T, D]`."""
        heads = self.config.symbol_heads
        templates, library = (split_heads(p[...].astype(x.dtype), heads) for p in (self.templates, self.library))  # [N, heads, K]
        query = split_heads(self.symbol_query(x), heads)
        logits = jnp.einsum("bthk,nhk->bthn", query, templates).astype(jnp.float32) * query.shape[-1] ** -0.5
        return join_heads(jnp.einsum("bthn,nhk->bthk", jax.nn.softmax(logits, axis=-1).astype(x.dtype), library))

    def project(self, x, *, at, state):
        x = x.astype(self.dtype)

        def heads(dense: Dense, y: jax.Array, number: int, axis: str = KV_HEADS) -> jax.Array:
            return self.split(dense(y), number, axis)

        placed = self.placed(x, at)
        relating = self.relating(x)
        inputs = Dual(
            q=self.turned(heads(self.q, placed, self.sensory, HEADS), at),
            k=self.turned(heads(self.k, placed, self.kv[0]), at),
            values=heads(self.v, x, self.kv[0]),
            r_q=self.turned(heads(self.r_q, placed, self.relational, HEADS), at),
            r_k=self.turned(heads(self.r_k, placed, self.kv[1]), at),
            symbols=heads(self.r_v, self.symbols(x), self.kv[1]),
            related=relating if self.related is None else self.related(x),
            relating=relating,
        )
        return inputs, state

    def entries(self):
        heads = {"k": self.kv[0], "values": self.kv[0], "r_k": self.kv[1], "symbols": self.kv[1]}
        related = {"related": ((self.relational * self.channels,), None)}
        return {name: ((number, self.channels), KV_HEADS) for name, number in heads.items()} | related

    def kept(self, inputs):
        return {name: getattr(inputs, name) for name in self.entries()}

    def recalled(self, inputs, cache):
        return inputs._replace(**cache.entries, kv_at=cache.at)

    def both_options(self, inputs: Dual, at: Tokens) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the op for sensory and for relational heads."""
        options, kv_at = self.options(inputs, at), at if inputs.kv_at is None else inputs.kv_at
        bias = None if self.r_positions is None else self.r_positions.bias(at, kv_at, scale=self.scale)
        return options, {**options, "bias": bias}

    def weigh(self, inputs, *, at):
        where: dict[str, Any] = {"at": at, "kv_at": inputs.kv_at}
        sensory, relational = self.both_options(inputs, at)
        first: Any = attention(inputs.q, inputs.k, inputs.values, **where, **sensory)
        second: Any = attention(inputs.r_q, inputs.r_k, inputs.r_v, **where, **relational)
        return _joined(first, second)

    attend_active = HeadMixer.attend_active

    def finish(self, o, inputs, x):
        sensory, relational = o[:, :, : self.sensory, : self.channels], o[:, :, self.sensory :]
        symbols, met = relational[..., : self.channels], relational[..., self.channels :]
        met = met.reshape(*met.shape[:3], self.config.relations, -1)
        relating = split_heads(inputs.relating, self.config.relations)  # [B, T, L, P]
        r = jnp.einsum("btlp,bthlp->bthl", relating, met) * relating.shape[-1] ** -0.5
        return jnp.concatenate(
            [sensory, symbols + jnp.einsum("bthl,hlk->bthk", r, self.of_relations.weight().astype(r.dtype))], axis=2
        )

    def output(self, o):
        return jnp.concatenate(
            [self.o(join_heads(o[:, :, : self.sensory])), self.r_o(join_heads(o[:, :, self.sensory :]))], axis=-1
        )

    def implied(self, inputs, rows, *, at):
        sensory, relational = self.both_options(inputs, at)
        weights = attention_rows(inputs.q, inputs.k, rows=rows, at=at, **sensory)
        return jnp.concatenate([weights, attention_rows(inputs.r_q, inputs.r_k, rows=rows, at=at, **relational)], axis=1)

    def observe(self, inputs, x, *, at):
        return {}  # the two kinds are two calls of the op; probes look at rows of both

"""Mega: gated attention of one head on a moving average of the tokens."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Factor, Span
from plait.kernels import LowRankBias, Mask, Tokens, attention, selective_scan
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Cache, Slots
from plait.models.layers.linear import Dense
from plait.models.mixers.base import HeadKind, HeadMixer, MixerConfig, register
from plait.models.mixers.heads import expanded
from plait.models.positions.rope import rotate

THETA = 10_000.0
"""Base of the rotary bias."""
LAPLACE_MEAN, LAPLACE_DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
BLOCK = 128
"""Queries whose weights exist at once where the attention op does not serve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MegaOptions(MixerConfig):
    """What the mixers of Mega have in common; see `MegaConfig` for the equations."""

    directions = ("causal", "bidirectional")

    attention_dim: Channels | None = None
    """Channels of queries and keys; None gives d_model / 4."""
    expand: Factor = 2.0
    """Channels of values over d_model."""
    state_dim: Channels = 16
    """Averages a channel."""
    weights: Literal["softmax", "laplace"] = "softmax"
    """What becomes of the logits; `laplace` runs in blocks of plain JAX."""
    bias: Literal["rotary", "simple"] = "rotary"
    """Of the distance: a product of two rotated vectors, or, in blocks of plain JAX, a number a distance."""

    @property
    @abc.abstractmethod
    def chunk(self) -> int | None:
        """Tokens of a document that see each other; None for all."""

    @property
    @abc.abstractmethod
    def distances(self) -> int:
        """How many the simple bias tells apart to a side."""

    @property
    def on_attention(self) -> bool:
        """Whether the attention op serves."""
        return (self.weights, self.bias) == ("softmax", "rotary")

    def dims(self, d_model: int) -> tuple[int, int]:
        """Channels of a query and of a value at width `d_model`."""
        dim = self.attention_dim or d_model // 4
        if dim < 1 or (self.bias == "rotary" and dim % 2):
            raise ValueError(
                f"attention_dim={dim} must be even where bias='rotary' rotates channels in pairs; use {dim + dim % 2 or 2}, "
                "or bias='simple'"
            )
        return dim, expanded(self.expand, d_model)

    def fit(self, d_model: int) -> None:
        self.dims(d_model)
        super().fit(d_model)

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        return ("attention",)

    def build(self, d_model: int, ctx: BuildContext) -> Mega:
        return Mega(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        dim, value_dim = self.dims(d_model)
        columns = dim * (2 if self.bias == "rotary" else 1) + value_dim
        return 2.0 * self.state_dim * d_model + 2.0 * columns * self.mean_keys(seq_len)

    def mean_keys(self, seq_len: int) -> float:
        """Keys that a query meets, the mean over a sequence: those it sees, or in plain JAX all of which some query of its block may."""
        return (seq_len + 1) / 2 if self.on_attention else keys_of_blocks(seq_len, self.chunk)


@register(
    "mega",
    kind="full",
    source="Mega: Moving Average Equipped Gated Attention (2209.10655)",
    proof="the authors' cell and moving average",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MegaConfig(MegaOptions):
    """`y = u (silu(W_h m + W_o (r o)) - x)`, `o` attending with q and k of the moving average m and values of x.

    `m = silu(ema(x) + w x)`: n averages a channel, `s_t = (1 - p a) s_{t-1} + p b x_t` read by `c / sqrt(n)`, p and a sigmoids of parameters.
    `z = silu(W_z m)`, `q = c_q z + d_q`, `k = c_k z + d_k`, `v = silu(W_v x)`, `r = silu(W_r m)`, `u = sigmoid(W_u m)`; all projections have
    biases. Weights are `softmax(q k / sqrt(dim) + bias)` or `laplace(q k / n + bias)`, n being the number of keys that are seen, with
    `laplace(x) = (1 + erf((x - sqrt(1/2)) / sqrt(1 / 2 pi))) / 2`.

    The published cell holds the residual connection, and x in y is its unnormalised input; here it is the layer's input, which the block has
    normalised. There is one head. Cost grows with the square of the length; `mega_chunk` is linear in it. Where a token sees all of its
    document, a second set of averages runs from the other end, and the simple bias has a number for distances to either side.
    """

    max_distance: Span = 1024
    """Distances that the simple bias tells apart; those beyond have the last one's number."""

    @classmethod
    def example(cls) -> MegaConfig:
        return cls(state_dim=2, expand=1.5)

    @property
    def chunk(self) -> None:
        return None

    @property
    def distances(self) -> int:
        return self.max_distance


class MegaInputs(NamedTuple):
    q: jax.Array  # [B, T, 1, K]
    k: jax.Array  # [B, S, 1, K]
    v: jax.Array  # [B, S, 1, V]
    r: jax.Array  # [B, T, V]
    u: jax.Array  # [B, T, D]
    h: jax.Array  # W_h m, [B, T, D]


class Side(NamedTuple):
    """Queries or keys, and where they stand."""

    x: jax.Array
    """`[B, T, K]`."""
    turned: jax.Array | None
    """Their side of the rotary bias, `[B, T, K]` float32."""
    segment_ids: jax.Array
    positions: jax.Array


class MegaState(NamedTuple):
    """Decode memory."""

    average: jax.Array
    """`[B, n, D]` float32."""
    cache: Cache


class MovingAverage(nnx.Module):
    """`n` damped averages of each channel, read as one: `s_t = (1 - p a) s_{t-1} + p b x_t`, `y_t = sum c s_t / sqrt(n)`."""

    def __init__(self, ctx: BuildContext, number: int, dim: int):
        normal, shape = jax.nn.initializers.normal, (number, dim)
        self.p, self.a = (ctx.param(normal(0.2), shape, (None, EMBED), role="decay") for _ in range(2))
        self.b = ctx.param(_alternating, shape, (None, EMBED))
        self.c = ctx.param(normal(1.0), shape, (None, EMBED))

    def __call__(self, x: jax.Array, start: jax.Array | None, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """`y [B, T, D]`, and the averages `[B, n, D]` after the last token."""
        p, a, b, c = (param[...].astype(jnp.float32) for param in (self.p, self.a, self.b, self.c))
        p, a = jax.nn.sigmoid(p), jax.nn.sigmoid(a)
        return selective_scan(x, None, jnp.log1p(-p * a), None, c * b * p * len(p) ** -0.5, initial_state=start, at=at)


def _alternating(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Of b: the averages of a channel alternate in sign."""
    signs = jnp.where(jnp.arange(shape[0]) % 2, -1.0, 1.0)[:, None]
    return signs + 0.02 * jax.random.normal(key, shape, dtype)


class Mega(HeadMixer):
    """See `MegaConfig`."""

    num_heads = 1

    def __init__(self, config: MegaOptions, d_model: int, ctx: BuildContext):
        self.config, self.dtype = config, ctx.compute_dtype
        self.dim, self.value_dim = config.dims(d_model)
        self.causal = ctx.causal
        self.mask, self.slots = Mask(causal=self.causal, window_size=config.chunk), Slots(config.chunk)
        normal = jax.nn.initializers.normal
        self.average = MovingAverage(ctx, config.state_dim, d_model)
        self.later = None if self.causal else MovingAverage(ctx, config.state_dim, d_model)
        self.w = ctx.param(normal(1.0), (d_model,), (EMBED,))
        dense = lambda width, axis, role: Dense(ctx, d_model, width, (EMBED, axis), init=normal(0.02), use_bias=True, role=role)
        self.v, self.z, self.h = (
            dense(self.value_dim, HEADS, "matrix"),
            dense(self.dim, None, "matrix"),
            dense(d_model, None, "matrix"),
        )
        self.r, self.u = dense(self.value_dim, HEADS, "gate"), dense(d_model, None, "gate")
        self.scale = ctx.param(normal(0.02), (2, self.dim), (None, None))
        self.shift = ctx.param(jax.nn.initializers.zeros, (2, self.dim), (None, None))
        self.distances = config.distances
        numbers = (2, self.dim) if config.bias == "rotary" else (self.distances if self.causal else 2 * self.distances - 1,)
        self.bias = ctx.param(normal(0.02), numbers, (None,) * len(numbers))
        self.o = Dense(ctx, self.value_dim, d_model, (HEADS, EMBED), init=ctx.residual_init, use_bias=True)

    def moving_average(self, x: jax.Array, start: jax.Array | None, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """`silu(ema(x) + w x)`, and the averages `[B, n, D]` after the last token."""
        ema, last = self.average(x, start, at=at)
        if self.later is not None:
            other, _ = self.later(jnp.flip(x, 1), None, at=Tokens(None, jnp.flip(at.segment_ids, 1)))
            ema += jnp.flip(other, 1)
        return jax.nn.silu(ema + self.w[...].astype(x.dtype)[None, None] * x), last

    def project(self, x, *, at, state):
        x = x.astype(self.dtype)
        m, last = self.moving_average(x, None if state is None else state.average, at=at)
        z = jax.nn.silu(self.z(m))
        q, k = (z * scale[None, None] + shift[None, None] for scale, shift in zip(self.scale[...], self.shift[...], strict=True))
        one = lambda y: y.astype(self.dtype)[:, :, None]
        v, r, u = jax.nn.silu(self.v(x)), jax.nn.silu(self.r(m)), jax.nn.sigmoid(self.u(m))
        inputs = MegaInputs(one(q), one(k), one(v), r, u, self.h(m))
        return inputs, None if state is None else state._replace(average=last)

    def attend(self, inputs, *, at, state):
        if state is not None:
            state = state._replace(cache=self.slots.write(state.cache, {"k": inputs.k, "v": inputs.v}, at))
        if not self.config.on_attention:
            return in_blocks(self.weights, *self.sides(inputs, at), inputs.v, self.config.chunk, self.causal), state
        bias = LowRankBias(*(self._turned(i, at.positions)[:, :, None] for i in range(2)))
        return attention(inputs.q, inputs.k, inputs.v, mask=self.mask, at=by_chunk(at, self.config.chunk), bias=bias), state

    def recall(self, inputs, carry, *, at, state):
        state = state._replace(cache=self.slots.write(state.cache, {"k": inputs.k, "v": inputs.v}, at))
        return inputs, carry, state

    def attend_step(self, inputs, *, at, state):
        old = state.cache
        here = Tokens(None, jnp.ones_like(at.positions), at.positions)
        weights = self.weights(self.side(0, inputs.q, here), self.side(1, old.entries["k"], old.at))
        v = old.entries["v"]
        return jnp.einsum("bts,bshv->bthv", weights.astype(v.dtype), v), state

    def side(self, number: int, x: jax.Array, at: Tokens) -> Side:
        """Side 0, queries, or 1, keys `[B, T, 1, K]`."""
        turned = self._turned(number, at.positions) if self.config.bias == "rotary" else None
        return Side(x[:, :, 0], turned, at.segment_ids, at.positions)

    def sides(self, inputs: MegaInputs, at: Tokens) -> tuple[Side, Side]:
        """The queries and the keys of the same tokens."""
        return self.side(0, inputs.q, at), self.side(1, inputs.k, at)

    def weights(self, q: Side, k: Side) -> jax.Array:
        """`[B, T, S]` float32."""
        place, kv_place = q.positions[:, :, None], k.positions[:, None]
        ids, distance = q.segment_ids[:, :, None], place - kv_place
        visible = (ids == k.segment_ids[:, None]) & (ids > 0)
        visible = visible & (distance >= 0) if self.causal else visible
        if self.config.chunk is not None:
            visible &= place // self.config.chunk == kv_place // self.config.chunk
        logits = jnp.einsum("btk,bsk->bts", q.x, k.x, preferred_element_type=jnp.float32)
        if q.turned is not None:
            bias = jnp.einsum("btk,bsk->bts", q.turned, k.turned, precision="highest")
        else:
            table = self.bias[...].astype(jnp.float32)
            bias = table[jnp.clip(distance + len(table) - self.distances, 0, len(table) - 1)]
        if self.config.weights == "softmax":
            logits = jnp.where(visible, logits * self.dim**-0.5 + bias, -1e30)
            return jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0)
        logits = logits / jnp.maximum(visible.sum(-1, keepdims=True), 1) + bias
        laplace = 0.5 * jax.lax.erfc((LAPLACE_MEAN - logits) / (LAPLACE_DEVIATION * 2**0.5))
        return jnp.where(visible, laplace, 0)

    def _turned(self, side: int, positions: jax.Array) -> jax.Array:
        """One side's vector of the rotary bias at each position, `[B, T, K]`."""
        vector = self.bias[...][side].astype(jnp.float32)
        vectors = jnp.broadcast_to(vector[None, None, None], (*positions.shape, 1, self.dim))
        return rotate(vectors, positions, THETA)[:, :, 0]

    def finish(self, o, inputs, x):
        """The gated head, and beside it what `output` needs of the token itself."""
        own = jnp.concatenate([inputs.u, inputs.h, x.astype(o.dtype)], axis=-1)
        return jnp.concatenate([o * inputs.r[:, :, None], own[:, :, None]], axis=-1)

    def output(self, o):
        head, own = jnp.split(o[:, :, 0], [self.value_dim], axis=-1)
        u, h, x = jnp.split(own, 3, axis=-1)
        return u * (jax.nn.silu(h + self.o(head)) - x)

    def implied(self, inputs, rows, *, at):
        q, k = self.sides(inputs, at)
        return self.weights(jax.tree.map(lambda y: y[:, rows], q), k)[:, None]

    def init_state(self, batch_size, max_len):
        average = constrain(jnp.zeros((batch_size, *self.average.p.shape), jnp.float32), (BATCH, None, None))
        entries = {"k": ((1, self.dim), None), "v": ((1, self.value_dim), None)}
        return MegaState(average, self.slots.empty(batch_size, max_len, entries, self.dtype))


def by_chunk(at: Tokens, chunk: int | None) -> Tokens:
    """The tokens, each chunk of a document a segment of its own."""
    if chunk is None:
        return at
    number = at.numbered() * (at.positions.shape[1] // chunk + 2) + at.positions // chunk
    return Tokens(at.ids, jnp.where(at.segment_ids > 0, number, 0), at.positions)


def keys_of_blocks(length: int, chunk: int | None) -> float:
    """Keys that `in_blocks` multiplies with each query of a sequence, filled-up blocks on its tokens."""
    block = min(BLOCK, length)
    blocks = -(-length // block)
    keys = length if chunk is None or chunk > length else chunk - 1 + block
    return blocks * block * keys / length


def in_blocks(
    weigh: Callable[[Side, Side], jax.Array], q: Side, k: Side, v: jax.Array, chunk: int | None, causal: bool
) -> jax.Array:
    """`weigh(q, k) v` `[B, T, 1, V]` for one block of queries after another, each with the keys that may be in a chunk with them.

    Linear memory: no more weights than a block's exist at once, in the backward pass either.
    """
    batch, length = q.positions.shape
    block = min(BLOCK, length)
    blocks = -(-length // block)
    far = chunk is None or chunk > length
    reach = 0 if chunk is None or far else chunk - 1
    ahead = 0 if causal else reach
    filled = lambda y, before, after: jnp.pad(y, ((0, 0), (before, blocks * block - length + after), *[(0, 0)] * (y.ndim - 2)))
    cut = lambda y: jnp.moveaxis(filled(y, 0, 0).reshape(batch, blocks, block, *y.shape[2:]), 1, 0)
    keys = (k, v[:, :, 0])
    keys = keys if far else jax.tree.map(lambda y: filled(y, reach, ahead), keys)

    @jax.checkpoint
    def one(number: jax.Array, q: Side) -> tuple[jax.Array, jax.Array]:
        near = lambda y: jax.lax.dynamic_slice_in_dim(y, number * block, reach + block + ahead, 1)
        k, v = keys if far else jax.tree.map(near, keys)
        return number + 1, jnp.einsum("bts,bsv->btv", weigh(q, k).astype(v.dtype), v)

    _, o = jax.lax.scan(one, jnp.zeros((), jnp.int32), jax.tree.map(cut, q))
    o = jnp.moveaxis(o, 0, 1).reshape(batch, blocks * block, 1, -1)[:, :length]
    return constrain(o, (BATCH, LENGTH, None, None))

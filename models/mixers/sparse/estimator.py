"""The estimator of SEA: linear attention, and a decoder of what it finds into a map of attention of constant width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens
from plait.kernels.recurrence import over_weights, with_ones
from plait.kernels.reflections import orthonormal_rows
from plait.models.axes import BATCH, HEADS, constrain
from plait.models.build import BuildContext, Moved
from plait.models.layers.linear import Dense
from plait.models.layers.norms import GroupNorm
from plait.models.mixers.linear.sums import Sums, read_flops
from plait.models.positions.rope import frequencies

UPSAMPLE = 4
"""Columns of the map for each that the convolutions see."""
TAPS, DILATION, PER_HEAD = 3, 2, 2
"""Of the convolutions: taps and their distance, back in time and across columns, and channels a head."""
REACH = (TAPS - 1) * DILATION
"""Tokens back that a convolution sees."""
FEATURE_FLOOR, NORM_EPS, THETA = 1e-3, 1e-5, 10_000.0


class Estimate(NamedTuple):
    """What the estimator says of each query."""

    scores: jax.Array  # [B, T, H, K] float32, of columns
    scales: jax.Array  # [B, T, H, 2] float32, from 0 to 1


class EstimatorState(NamedTuple):
    """What decoding keeps of the tokens before."""

    memory: jax.Array  # [B, H, F, 2 C + 1] float32
    rows: Mapping[str, jax.Array]  # the last inputs of each convolution, [B, REACH, 2 H, K / 4]


def num_features(channels: int) -> int:
    """Features of a head of so many channels, as Performers have: `C ln C`."""
    return max(int(channels * math.log(channels)), 1)


def orthogonal_features(key: jax.Array, features: int, channels: int) -> jax.Array:
    """`[F, C]` of rows as long as normal ones, orthogonal in runs of C. Source: Performers (2009.14794), section 2.4."""
    runs = -(-features // channels)
    directions, lengths = jax.random.normal(key, (2, runs, channels, channels), jnp.float32)
    rows = jax.vmap(orthonormal_rows)(directions) * jnp.linalg.norm(lengths, axis=-1, keepdims=True)
    return rows.reshape(-1, channels)[:features]


def shared_weights(channels: int, width: int) -> int:
    """Weights of the matrices that all heads share."""
    return 2 * channels * (3 * channels + PER_HEAD * width // UPSAMPLE + 2)


def estimator_flops(heads: int, kv_heads: int, channels: int, width: int) -> tuple[float, float]:
    """Operations of a token besides one product with each matrix: with weights, and with other tokens by the memory."""
    features, inner, columns = num_features(channels), PER_HEAD * heads, width // UPSAMPLE
    maps = 2.0 * features * channels * (heads + kv_heads)
    convolutions = 2.0 * columns * inner * (2 * TAPS**2 * inner + heads)
    again = 2.0 * (heads - 1) * shared_weights(channels, width)
    return maps + convolutions + again, heads * read_flops(features, 2 * channels + 1)


class CausalConv(nnx.Module):
    """`y_t[c] = b + sum_{i, j} W_ij x_{t - 2 i}[c + 2 (j - 1)]`, i and j of 0, 1, 2, zeros before the document and beside the columns."""

    def __init__(self, ctx: BuildContext, channels: int):
        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / (TAPS * channels**0.5)

        self.weight = ctx.param(uniform, (TAPS, TAPS, channels, channels), (None,) * 4, role="conv")
        self.bias = ctx.param(uniform, (channels,), (None,))

    def __call__(self, x: jax.Array, *, at: Tokens, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, C, W]` to the same shape, and its last `REACH` rows, from which `before` goes on."""
        if at.segment_ids is not None:
            x = jnp.where((at.segment_ids > 0)[:, :, None, None], x, 0)
        if before is None:
            before = jnp.zeros((x.shape[0], REACH, *x.shape[2:]), x.dtype)
        (length, _, columns), rows = x.shape[1:], jnp.concatenate([before.astype(x.dtype), x], axis=1)
        beside = DILATION * (TAPS // 2)
        padded = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (beside, beside)))
        weight = self.weight[...].astype(x.dtype)
        y = self.bias[...].astype(x.dtype)[None, None, :, None]
        for i in range(TAPS):
            back = i * DILATION
            row = padded[:, REACH - back : REACH - back + length]
            row = jnp.where((at.positions >= back)[:, :, None, None], row, 0)
            for j in range(TAPS):
                y = y + jnp.einsum("btcw,cd->btdw", row[..., j * DILATION : j * DILATION + columns], weight[i, j])
        return y, rows[:, -REACH:]


class Estimator(nnx.Module):
    """Scores of K columns for each query and head, and two scales.

        c_i = sum_j (f(q_i) . f(k_j)) [p_j, v_j] / sum_j f(q_i) . f(k_j)     f(x) = relu(P x / C^(1/4)) + 0.001,  j <= i
        t_i = gelu(norm(W [c_i, v_i] + b))                                  scales = sigmoid(W_s t_i + b_s)
        scores = norm(repeat_4(W_3 relu(conv(relu(conv(norm(W_r t_i + b_r)))))))

    W, W_r and W_s are one for all heads; the rows of W_r t are two channels a head of K / 4 columns, over which the norms go, and the
    convolutions mix all heads. `repeat_4` makes four columns of each.
    """

    def __init__(self, ctx: BuildContext, *, num_heads: int, channels: int, width: int):
        """Args: `channels` of a head, `width` K, a multiple of 4."""
        self.num_heads, self.channels, self.columns, self.dtype = num_heads, channels, width // UPSAMPLE, ctx.compute_dtype
        inner = PER_HEAD * num_heads
        self.features = Moved(orthogonal_features(ctx.rngs.params(), num_features(channels), channels), axes=(None, None))
        self.encode = Dense(ctx, 3 * channels, 2 * channels, (None, None), use_bias=True)
        self.encode_norm = GroupNorm(ctx, 2 * channels, groups=1, eps=NORM_EPS)
        self.rows = Dense(ctx, 2 * channels, PER_HEAD * self.columns, (None, None), use_bias=True)
        self.rows_norm = GroupNorm(ctx, self.columns, groups=1, eps=NORM_EPS)
        self.first, self.second = (CausalConv(ctx, inner) for _ in range(2))
        lecun = jax.nn.initializers.lecun_normal()
        self.last = ctx.param(lecun, (inner, num_heads), (None, None), role="conv")
        self.last_bias = ctx.param(jax.nn.initializers.zeros, (num_heads,), (None,))
        self.last_norm = GroupNorm(ctx, width, groups=1, eps=NORM_EPS)
        self.scales = Dense(ctx, 2 * channels, 2, (None, None), use_bias=True, role="gate")

    def init_state(self, batch_size: int) -> EstimatorState:
        """The start of a document."""
        shape = batch_size, self.num_heads, num_features(self.channels), 2 * self.channels + 1
        memory = constrain(jnp.zeros(shape, jnp.float32), (BATCH, HEADS, None, None))
        rows = jnp.zeros((batch_size, REACH, PER_HEAD * self.num_heads, self.columns), self.dtype)
        rows = constrain(rows, (BATCH, None, None, None))
        return EstimatorState(memory, {"first": rows, "second": rows})

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, at: Tokens, state: EstimatorState | None
    ) -> tuple[Estimate, EstimatorState | None]:
        """Of queries `[B, T, H, C]`, keys and values `[B, T, Hkv, C]`; the state after the last token where one is given."""
        share = self.num_heads // k.shape[2]
        values = jnp.repeat(v, share, axis=2)
        where = jnp.broadcast_to(self._waves(at)[:, :, None], values.shape).astype(jnp.float32)
        sums = Sums(at, causal=True, state=None if state is None else {"memory": state.memory})
        read = jnp.concatenate([where, values.astype(jnp.float32)], axis=-1)
        context = over_weights(sums.read("memory", self._mapped(q), jnp.repeat(self._mapped(k), share, axis=2), with_ones(read)))
        known = self.encode(jnp.concatenate([context.astype(v.dtype), values], axis=-1))
        known = jax.nn.gelu(self.encode_norm(known), approximate=False)
        rows = self.rows(known)
        rows = self.rows_norm(rows.reshape(*rows.shape[:2], PER_HEAD * self.num_heads, self.columns))
        kept = {}
        for name in ("first", "second"):
            before = None if state is None else state.rows[name]
            rows, kept[name] = getattr(self, name)(rows, at=at, before=before)
            rows = jax.nn.relu(rows)
        columns = jnp.einsum("btcw,ch->bthw", rows, self.last[...].astype(rows.dtype))
        columns = (columns + self.last_bias[...].astype(rows.dtype)[None, None, :, None]).astype(jnp.float32)
        scores = self.last_norm(jnp.repeat(columns, UPSAMPLE, axis=-1))
        estimate = Estimate(scores, jax.nn.sigmoid(self.scales(known).astype(jnp.float32)))
        if state is None:
            return estimate, None
        kept = {name: x.astype(state.rows[name].dtype) for name, x in kept.items()}
        return estimate, EstimatorState(sums.after["memory"], kept)

    def _mapped(self, heads: jax.Array) -> jax.Array:
        """Features `[B, T, H, F]` float32."""
        features = jax.lax.stop_gradient(self.features[...]).astype(jnp.float32)
        x = jnp.einsum("bthc,fc->bthf", heads.astype(jnp.float32), features, precision="highest")
        return jax.nn.relu(x * self.channels**-0.25) + FEATURE_FLOOR

    def _waves(self, at: Tokens) -> jax.Array:
        """`[B, T, C]`: sines and cosines of the positions."""
        angle = (
            at.positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(self.channels, THETA), jnp.float32)[None, None]
        )
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], -1)[..., : self.channels]

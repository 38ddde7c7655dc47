"""Softmax attention (MHA, MQA, GQA) and its usual options; sigmoid attention by one of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import Mask, Tokens, attention, routed_attention
from plait.kernels.attention import attention_rows
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, require_divides, require_positive, resolve_heads, split_heads
from plait.models.mixers.stats import row_statistics
from plait.models.norms import RMSNorm
from plait.models.rope import rotate


@register("softmax", kind="full", source="Attention Is All You Need (1706.03762); GQA (2305.13245)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j` over the visible keys."""

    num_heads: int | None = None
    """Query heads; None gives d_model / head_dim."""
    num_kv_heads: int | None = None
    """Key and value heads, a divisor of num_heads (1: MQA); None gives num_heads (MHA)."""
    head_dim: int = 64
    """Channels of a head."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""
    qk_norm: bool = False
    """RMS-normalise q and k per head before the rotary embedding, with a learned gain."""
    window_size: int | None = None
    """Visible keys of a query, itself included; None for all earlier ones."""
    num_sink_tokens: int = 0
    """Leading tokens of each document that stay visible outside the window (arXiv 2309.17453)."""
    sink_logits: bool = False
    """A learned logit per head that takes part in the normalisation only, as in GPT-OSS."""
    gate: Literal["elementwise", "headwise"] | None = None
    """Sigmoid gate of the head outputs, from the layer's input (arXiv 2505.06708)."""
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    """`sigmoid`: each weight is sigmoid(logit - log n) on its own, n the training length (arXiv 2409.04431)."""

    def __post_init__(self) -> None:
        path = f"model.mixers.{self.name}"
        require_positive(
            path, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, window_size=self.window_size
        )
        if self.num_sink_tokens < 0:
            raise ValueError(f"{path}.num_sink_tokens={self.num_sink_tokens} must be 0 or more")
        if self.num_sink_tokens and self.window_size is None:
            raise ValueError(
                f"{path}.num_sink_tokens={self.num_sink_tokens} needs a window, without which all are visible; set window_size"
            )
        if self.rope_theta is not None and (self.rope_theta <= 0 or self.head_dim % 2):
            raise ValueError(
                f"{path}.rope_theta={self.rope_theta} must be positive and head_dim={self.head_dim} even; use None for NoPE"
            )
        if self.sink_logits and self.normalizer != "softmax":
            raise ValueError(
                f"{path}.sink_logits=True needs normalizer='softmax', not {self.normalizer!r}: only softmax has a denominator"
            )

    @classmethod
    def example(cls) -> SoftmaxConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        path = f"model.mixers.{self.name}"
        num_heads = resolve_heads(path, self.num_heads, d_model, self.head_dim)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(path, ("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads

    def build(self, d_model: int, ctx: BuildContext) -> Softmax:
        return Softmax(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model)[0] * self.head_dim * self._mean_keys(seq_len)

    def _mean_keys(self, seq_len: int) -> float:
        most = seq_len if self.window_size is None else min(seq_len, self.window_size + self.num_sink_tokens)
        return most - most * (most - 1) / 2 / seq_len


class KVCache(NamedTuple):
    """Keys (rotated), values and their positions; -1 marks an empty slot. With a window, a ring behind the sink tokens' slots."""

    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    positions: jax.Array  # [B, S] int32


class QKV(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, Hkv, K]
    v: jax.Array  # [B, T, Hkv, K]


class Softmax(HeadMixer):
    """See `SoftmaxConfig`."""

    def __init__(self, config: SoftmaxConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        self.dtype = ctx.compute_dtype
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        self.q = Dense(ctx, d_model, width, (EMBED, HEADS))
        self.k = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS))
        self.v = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init)
        self.q_norm = RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None
        gate_width = {"elementwise": width, "headwise": self.num_heads}.get(config.gate or "")
        self.gate = Dense(ctx, d_model, gate_width, (EMBED, HEADS)) if gate_width else None
        self.sinks = ctx.param(jax.nn.initializers.zeros, (self.num_heads,), (HEADS,)) if config.sink_logits else None
        self.sigmoid_bias = -math.log(ctx.seq_len) if config.normalizer == "sigmoid" else None
        self.mask = Mask(causal=True, window_size=config.window_size, num_sink_tokens=config.num_sink_tokens)

    def project(self, x, *, segment_ids, positions, state):
        q = constrain(split_heads(self.q(x), self.num_heads), (BATCH, LENGTH, HEADS, None))
        k = constrain(split_heads(self.k(x), self.num_kv_heads), (BATCH, LENGTH, KV_HEADS, None))
        v = constrain(split_heads(self.v(x), self.num_kv_heads), (BATCH, LENGTH, KV_HEADS, None))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope_theta is not None:
            q, k = rotate(q, positions, self.config.rope_theta), rotate(k, positions, self.config.rope_theta)
        return QKV(q, k, v), state

    @property
    def _options(self) -> dict:
        sinks = None if self.sinks is None else self.sinks[...]
        return {"mask": self.mask, "sinks": sinks, "normalizer": self.config.normalizer, "sigmoid_bias": self.sigmoid_bias}

    def attend(self, inputs, *, segment_ids, positions, state):
        o = attention(*inputs, at=Tokens(None, segment_ids, positions), **self._options)
        if state is not None:
            state = self._remember(state, inputs, positions, keep=(segment_ids > 0) & (segment_ids == segment_ids[:, -1:]))
        return o, state

    def attend_active(self, inputs, active, *, segment_ids, positions):
        options = self._options
        if options.pop("normalizer") != "softmax":
            return super().attend_active(inputs, active, segment_ids=segment_ids, positions=positions)
        del options["sigmoid_bias"]
        q, k, v = inputs
        return routed_attention(q, k, v, active, at=Tokens(None, segment_ids, positions), **options)

    def attend_step(self, inputs, *, positions, state):
        state = self._remember(state, inputs, positions, keep=jnp.ones_like(positions, bool))
        filled = (state.positions >= 0).astype(jnp.int32)
        o = attention(
            inputs.q,
            state.k,
            state.v,
            at=Tokens(None, jnp.ones_like(positions), positions),
            kv_at=Tokens(None, filled, state.positions),
            **self._options,
        )
        return o, state

    def _remember(self, cache: KVCache, inputs: QKV, positions: jax.Array, keep: jax.Array) -> KVCache:
        """The cache with the kept tokens written to their slots."""
        window, sinks = self.config.window_size, self.config.num_sink_tokens
        slots = positions
        if window is not None:
            slots = jnp.where(positions < sinks, positions, sinks + (positions - sinks) % window)
            keep = keep & ((positions < sinks) | (positions > positions[:, -1:] - window))
        slots = jnp.where(keep, slots, cache.positions.shape[1])  # out of range: dropped
        rows = jnp.arange(positions.shape[0])[:, None]
        write = lambda old, new: old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
        return KVCache(write(cache.k, inputs.k), write(cache.v, inputs.v), write(cache.positions, positions))

    def init_state(self, batch_size, max_len):
        window = self.config.window_size
        slots = max_len if window is None else min(max_len, window + self.config.num_sink_tokens)
        shape = (batch_size, slots, self.num_kv_heads, self.config.head_dim)
        empty = constrain(jnp.zeros(shape, self.dtype), (BATCH, None, KV_HEADS, None))
        return KVCache(empty, empty, constrain(jnp.full(shape[:2], -1, jnp.int32), (BATCH, None)))

    def finish(self, o, x):
        if self.gate is None:
            return o
        gate = jax.nn.sigmoid(split_heads(self.gate(x), self.num_heads))  # [B, T, H, K or 1]
        return o * gate

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, segment_ids, positions):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=Tokens(None, segment_ids, positions), **self._options)

    def observe(self, inputs, x, *, segment_ids, positions):
        _, stats = attention(*inputs, at=Tokens(None, segment_ids, positions), return_stats=True, **self._options)
        first = stats.first_mass
        if self.sinks is not None:  # the share of the keys alone
            sinks = self.sinks[...].astype(jnp.float32)[None, None, :]
            first /= -jnp.expm1(jnp.minimum(sinks - stats.lse, -1e-6))
        real = (segment_ids > 0)[:, :, None]
        return {
            "max_logit": jnp.where(real, stats.max_logit, -jnp.inf).max((0, 1)),
            **row_statistics(stats.entropy, first, segment_ids=segment_ids, positions=positions),
        }

"""Softmax attention (MHA, MQA, GQA) and its usual options; sigmoid attention by one of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Base, Channels, Heads, Positive, SomeSpan, Span
from plait.kernels import Mask, Tokens, attention, attention_rows, column_mass, first_masses, routed_attention
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import Buffer, BuildContext
from plait.models.cache import Cache, Slots
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.norms import RMSNorm
from plait.models.rope import rotate
from plait.models.stream import CarryUse

VALUES, KV = "values", "kv"
"""Names in the carry: the first layer's values; keys and values left to later layers, or in decoding the cache that holds them."""


@register(
    "softmax",
    kind="full",
    source="Attention Is All You Need (1706.03762); GQA (2305.13245)",
    proof="transformers: Llama, Qwen3, GPT-OSS",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j` over the visible keys."""

    sees_all: ClassVar[bool] = True
    """Without a window, a query sees every earlier token."""

    num_heads: Heads | None = None
    """Query heads; None gives d_model / head_dim."""
    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads (1: MQA); None gives num_heads (MHA)."""
    head_dim: Channels = 64
    """Channels of a head."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None for no position encoding (NoPE)."""
    qk_norm: bool = False
    """RMS-normalise q and k per head before the rotary embedding, with a learned gain."""
    window_size: Span | None = None
    """Visible keys of a query, itself included; None for all earlier ones."""
    num_sink_tokens: SomeSpan = 0
    """Leading tokens of each document that stay visible outside the window (arXiv 2309.17453)."""
    sink_logits: bool = False
    """A learned logit per head that takes part in the normalisation only, as in GPT-OSS."""
    gate: Literal["elementwise", "headwise"] | None = None
    """Sigmoid gate of the head outputs, from the layer's input (arXiv 2505.06708)."""
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    """`sigmoid`: each weight is sigmoid(logit - log n) on its own, n the training length (arXiv 2409.04431)."""
    logit_soft_cap: Positive | None = None
    """Logits become `cap * tanh(logits / cap)`, as in Gemma 2 (arXiv 2408.00118)."""
    value_residual: bool = False
    """Values become `a v + b v_1`, v_1 being those of the first layer that has the option, a and b learned (arXiv 2410.17897)."""
    shared_kv: Literal["write", "read"] | None = None
    """`write`: leaves keys and values to later layers; `read`: takes the last ones left in place of its own and keeps no cache, as in
    CLA (arXiv 2405.12981) and YOCO (2405.05254)."""

    def check(self) -> None:
        if self.num_sink_tokens and self.window_size is None and self.sees_all:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} needs a window, without which all are visible; set window_size"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for NoPE"
            )
        if self.sink_logits and self.normalizer != "softmax":
            raise ValueError(
                f"sink_logits=True needs normalizer='softmax', not {self.normalizer!r}, which has no denominator; leave one of them out"
            )
        if self.shared_kv == "read" and self.value_residual:
            raise ValueError(
                "value_residual=True has no values to add to where shared_kv='read' takes those of another layer; leave one of them out"
            )

    @classmethod
    def example(cls) -> SoftmaxConfig:
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = resolve_heads(self.num_heads, d_model, self.head_dim)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        like = (self.heads(d_model)[1], self.head_dim)
        values = (CarryUse(VALUES, "first", like),) if self.value_residual else ()
        return values if self.shared_kv is None else (*values, CarryUse(KV, self.shared_kv, like))

    def mask(self) -> Any:
        """Which earlier tokens a query sees."""
        return Mask(causal=True, window_size=self.window_size, num_sink_tokens=self.num_sink_tokens)

    def slots(self) -> Slots:
        """Where decoding keeps keys and values."""
        return Slots(self.window_size, self.num_sink_tokens)

    def build(self, d_model: int, ctx: BuildContext) -> Softmax:
        return Softmax(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 4.0 * self.heads(d_model)[0] * self.head_dim * self.mean_keys(seq_len)

    def mean_keys(self, seq_len: int) -> float:
        """Visible keys of a query, the mean over a sequence."""
        most = seq_len if self.window_size is None else min(seq_len, self.window_size + self.num_sink_tokens)
        return most - most * (most - 1) / 2 / seq_len


class QKV(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class Softmax(HeadMixer):
    """See `SoftmaxConfig`."""

    def __init__(self, config: SoftmaxConfig, d_model: int, ctx: BuildContext):
        self.config = config
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        self.dtype, self.mask = ctx.compute_dtype, config.mask()
        self.slots = config.slots()
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        self.q = Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads))
        own_kv = config.shared_kv != "read"
        self.k = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS), heads=(1, self.num_kv_heads)) if own_kv else None
        self.v = Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS), heads=(1, self.num_kv_heads)) if own_kv else None
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))
        self.q_norm = RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm and own_kv else None
        gate_width = {"elementwise": width, "headwise": self.num_heads}.get(config.gate or "")
        self.gate = Dense(ctx, d_model, gate_width, (EMBED, HEADS), role="gate") if gate_width else None
        self.sinks = ctx.param(jax.nn.initializers.zeros, (self.num_heads,), (HEADS,)) if config.sink_logits else None
        self.sigmoid_bias = -math.log(ctx.seq_len) if config.normalizer == "sigmoid" else None
        first = jnp.asarray(ctx.layer_index == ctx.first_layers.get(VALUES, ctx.layer_index))
        self.value_mix = ctx.param(jax.nn.initializers.constant(0.5), (2,), (None,)) if config.value_residual else None
        self.is_first = Buffer(first, axes=()) if config.value_residual else None

    def project(self, x, *, at, state):
        def heads(dense: Dense | None, norm: RMSNorm | None, axis: str, rotary: bool) -> Any:
            if dense is None:
                return None
            number = self.num_heads if axis == HEADS else self.num_kv_heads
            y = constrain(split_heads(dense(x), number), (BATCH, LENGTH, axis, None))
            y = y if norm is None else norm(y)
            return rotate(y, at.positions, self.config.rope_theta) if rotary and self.config.rope_theta is not None else y

        q = heads(self.q, self.q_norm, HEADS, True)
        return QKV(q, heads(self.k, self.k_norm, KV_HEADS, True), heads(self.v, None, KV_HEADS, False)), state

    def share(self, inputs, carry):
        if self.value_mix is not None and self.is_first is not None:
            first = jnp.where(self.is_first[...], inputs.v, carry.get(VALUES, inputs.v))
            own, old = self.value_mix[...].astype(jnp.float32)
            mixed = (own * inputs.v + old * first).astype(inputs.v.dtype)
            inputs, carry = inputs._replace(v=jnp.where(self.is_first[...], inputs.v, mixed)), {**carry, VALUES: first}
        if self.config.shared_kv == "read":
            inputs = inputs._replace(k=carry[KV][0], v=carry[KV][1])
        elif self.config.shared_kv == "write":
            carry = {**carry, KV: (inputs.k, inputs.v)}
        return inputs, carry

    def recall(self, inputs, carry, *, at, state):
        if self.config.shared_kv == "read":
            cache = carry[KV]
        else:
            inputs, carry = self.share(inputs, carry)
            cache = state = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
            carry = {**carry, KV: cache} if self.config.shared_kv == "write" else carry
        return QKV(inputs.q, cache.entries["k"], cache.entries["v"], cache.at), carry, state

    def attend(self, inputs, *, at, state):
        o = attention(*inputs[:3], at=at, **self._options)
        if state is not None:
            state = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
        return o, state

    def attend_active(self, inputs, active, *, at):
        if self.config.normalizer != "softmax":
            return super().attend_active(inputs, active, at=at)
        sinks = None if self.sinks is None else self.sinks[...]
        return routed_attention(inputs.q, inputs.k, inputs.v, active, at=at, sinks=sinks, **self._logit_options)

    def attend_step(self, inputs, *, at, state):
        return attention(*inputs[:3], at=at, kv_at=inputs.kv_at, **self._options), state

    def init_state(self, batch_size, max_len) -> Cache | None:
        if self.config.shared_kv == "read":
            return None
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return self.slots.empty(batch_size, max_len, {"k": one, "v": one}, self.dtype)

    def finish(self, o, inputs, x):
        if self.gate is None:
            return o
        return o * jax.nn.sigmoid(split_heads(self.gate(x), self.num_heads))  # [B, T, H, K or 1]

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self._options)

    def observe(self, inputs, x, *, at):
        options: dict[str, Any] = {
            **self._logit_options,
            "at": at,
        }  # no sink logits: shares of what the keys get, however little that is
        _, stats = attention(inputs.q, inputs.k, inputs.v, return_stats=True, **options, **self._normalizer)
        lse = stats.lse
        masses = functools.partial(first_masses, inputs.q, inputs.k, lse, **options, **self._normalizer)
        found = {"attention": stats, "first_masses": masses}
        if self.config.normalizer == "softmax":
            found["column_mass"] = functools.partial(column_mass, inputs.q, inputs.k, lse, **options)
        return found

    @property
    def _logit_options(self) -> dict[str, Any]:
        return {"mask": self.mask, "logit_soft_cap": self.config.logit_soft_cap}

    @property
    def _normalizer(self) -> dict[str, Any]:
        return {"normalizer": self.config.normalizer, "sigmoid_bias": self.sigmoid_bias}

    @property
    def _options(self) -> dict[str, Any]:
        return {**self._logit_options, **self._normalizer, "sinks": None if self.sinks is None else self.sinks[...]}

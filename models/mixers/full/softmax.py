"""Softmax attention (MHA, MQA, GQA) and its usual options; sigmoid attention by one of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from plait.configs.components import at as under
from plait.configs.domains import Channels, Epsilon, Heads, Positive, SomeSpan, Span, Whole
from plait.kernels import Mask, Tokens, attention, attention_rows, column_mass, first_masses, routed_attention
from plait.kernels.attention.bias import folded_columns
from plait.kernels.attention.reference import capped
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import Buffer, BuildContext
from plait.models.layers.cache import Cache, Slots
from plait.models.layers.linear import Dense
from plait.models.layers.norms import AnyNorm, RMSNorm, make_norm
from plait.models.looks.look import GateValues, LogitMap
from plait.models.mixers.base import Direction, HeadMixer, MixerConfig, register
from plait.models.mixers.full.weighted import mean_keys
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.positions.base import POSITIONS, PositionConfig
from plait.models.positions.rotary import RotaryConfig
from plait.models.stream import CarryUse

VALUES, KV = "values", "kv"
"""Names in the carry: the first layer's values; keys and values left to later layers, or in decoding the cache that holds them, those of
layers with a window under a name with its size."""
_SINK_INIT = jax.nn.initializers.normal(0.02)


def with_positions(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a saved config, in which `rope_theta` was what `positions` is now."""
    if "rope_theta" not in fields:
        return fields
    rest = {key: value for key, value in fields.items() if key != "rope_theta"}
    theta = fields["rope_theta"]
    return {**rest, "positions": None if theta is None else {POSITIONS.tag: "rotary", "theta": theta}}


@register(
    "softmax",
    kind="full",
    source="Attention Is All You Need (1706.03762); GQA (2305.13245)",
    proof="transformers: Llama, Qwen2, Qwen3, OLMo 2, GPT-2, GPT-NeoX, GPT-OSS, T5, BLOOM",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """`o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j` over the visible keys."""

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")
    sees_all: ClassVar[bool] = True
    """Without a window, a query sees every earlier token."""

    num_heads: Heads | None = None
    """Query heads; None gives d_model / head_dim."""
    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads (1: MQA); None gives num_heads (MHA)."""
    head_dim: Channels = 64
    """Channels of a head."""
    positions: PositionConfig | None = RotaryConfig()
    """How queries and keys know where they stand; None for no position encoding (NoPE)."""
    scale: Positive | None = None
    """What multiplies the logits; None gives head_dim^-1/2."""
    log_n_scale: Annotated[int, Whole(2, 2**30)] | None = None
    """Queries are multiplied by `log(position + 1) / log(n)` where that is above 1, n this length, as in Qwen."""
    qkv_bias: bool = False
    """Biases of the projections to q, k and v, as in Qwen2."""
    o_bias: bool = False
    """Bias of the output projection, as, with those, in GPT-2, OPT and GPT-OSS."""
    qk_norm: bool = False
    """Normalise q and k before the positions, with a learned gain, by the model's kind of norm."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Whether that is each head by itself, as in Qwen3, or all heads as one, as in OLMo 2."""
    qk_norm_eps: Epsilon = 1e-6
    """Epsilon of that norm."""
    value_norm: bool = False
    """Divide the values of each head by their root mean square, as in Gemma 4; its epsilon is `qk_norm_eps`."""
    tie_kv: bool = False
    """Values are what keys are projected to, before their norm and positions, as in Gemma 4's layers without a window."""
    window_size: Span | None = None
    """Visible keys of a query, itself included; None for all earlier ones."""
    num_sink_tokens: SomeSpan = 0
    """Leading tokens of each document that stay visible outside the window (arXiv 2309.17453)."""
    sink_logits: bool = False
    """A learned logit per head that takes part in the normalisation only, as in GPT-OSS."""
    sink_bias: Literal["k", "kv", "v"] | None = None
    """A learned key of each key head, without position, that every query sees, whose value is zero (`k`) or learned (`kv`); or no key and
    a learned value that every head adds to its output (`v`); arXiv 2410.10781. With `kv` the values, also those that are cached and
    looked at, are relative to the learned one: `sum_j A_ij v_j + A_i* v* = v* + sum_j A_ij (v_j - v*)`."""
    value_scale: bool = False
    """Values become `v |v|^2 / (|v|^2 + C)`, C of each head learned and at first head_dim, the expected |v|^2: small ones, those of
    sinks, get little gradient, and massive activations go while sinks stay (arXiv 2603.17771)."""
    gate: Literal["elementwise", "headwise"] | None = None
    """Sigmoid gate of the head outputs, from the layer's input (arXiv 2505.06708)."""
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    """`sigmoid`: each weight is sigmoid(logit - log n) on its own, n the training length (arXiv 2409.04431)."""
    logit_soft_cap: Positive | None = None
    """Logits become `cap * tanh(logits / cap)`, as in Gemma 2 (arXiv 2408.00118)."""
    value_residual: bool = False
    """Values become `a v + b v_1`, v_1 being those of the first layer that has the option, a and b learned (arXiv 2410.17897)."""
    shared_kv: Literal["write", "read"] | None = None
    """`write`: leaves keys and values to later layers; `read`: takes the last ones that a layer of the same window left in place of its
    own and keeps no cache, as in CLA (arXiv 2405.12981), YOCO (2405.05254) and Gemma 3n."""

    def check(self) -> None:
        if self.num_sink_tokens and self.window_size is None and self.sees_all:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} needs a window, without which all are visible; set window_size"
            )
        if self.positions is not None:
            under("positions", self.positions.fit, self.head_dim)
        if self.sink_logits and self.normalizer != "softmax":
            raise ValueError(
                f"sink_logits=True needs normalizer='softmax', not {self.normalizer!r}, which has no denominator; leave one of them out"
            )
        if self.shared_kv == "read" and self.value_residual:
            raise ValueError(
                "value_residual=True has no values to add to where shared_kv='read' takes those of another layer; leave one of them out"
            )
        for name in ("value_norm", "tie_kv"):
            if self.shared_kv == "read" and getattr(self, name):
                raise ValueError(
                    f"{name}=True has no keys and values of its own where shared_kv='read' takes those of another layer; leave one of them out"
                )
        if self.sink_bias in ("k", "kv") and self.normalizer != "softmax":
            raise ValueError(
                f"sink_bias={self.sink_bias!r} needs normalizer='softmax', not {self.normalizer!r}, which has no denominator; use 'v'"
            )
        if self.sink_bias == "kv" and self.sink_logits:
            raise ValueError(
                "sink_bias='kv' is itself what takes the rest of the weights, as sink_logits=True does; leave one of them out"
            )
        if self.shared_kv is not None and (self.sink_bias == "kv" or (self.shared_kv == "read" and self.value_scale)):
            name = "sink_bias" if self.sink_bias == "kv" else "value_scale"
            raise ValueError(
                f"{name}={getattr(self, name)!r} changes values, which shared_kv={self.shared_kv!r} shares; leave one of them out"
            )

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_positions(fields)

    @classmethod
    def example(cls) -> SoftmaxConfig:
        return cls(num_heads=4, head_dim=16)

    @property
    def unclipped(self) -> str | None:
        if self.qk_norm:
            return "has qk_norm=True, which sets the size of queries and keys whatever their projections are"
        if self.logit_soft_cap is not None:
            return f"has logit_soft_cap={self.logit_soft_cap:g}, which bounds the logits"
        return None

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = resolve_heads(self.num_heads, d_model, self.head_dim)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads

    def settled(self, d_model: int) -> Self:
        num_heads, num_kv_heads = self.heads(d_model)
        return dataclasses.replace(self, num_heads=num_heads, num_kv_heads=num_kv_heads)

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        like = (self.heads(d_model)[1], self.head_dim)
        values = (CarryUse(VALUES, "first", like),) if self.value_residual else ()
        return values if self.shared_kv is None else (*values, CarryUse(self.kv_name, self.shared_kv, like))

    @property
    def kv_name(self) -> str:
        """Under which shared keys and values are in the carry."""
        return KV if self.window_size is None else f"{KV}/{self.window_size}"

    def mask(self, causal: bool = True) -> Any:
        """Which tokens of its document a query sees: earlier ones, or, in a window of as many on both sides, all."""
        return Mask(causal=causal, window_size=self.window_size, num_sink_tokens=self.num_sink_tokens)

    def slots(self) -> Slots:
        """Where decoding keeps keys and values."""
        return Slots(self.window_size, self.num_sink_tokens)

    def build(self, d_model: int, ctx: BuildContext) -> Softmax:
        return Softmax(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        channels = 2 * self.head_dim
        if self.positions is not None and self.positions.bias_rank:
            channels += folded_columns(self.positions.bias_rank, self.head_dim)
        return 2.0 * self.heads(d_model)[0] * (channels * self.seen_keys(d_model, seq_len) + self._bias_channels)

    @property
    def _bias_channels(self) -> int:
        """Channels of the product of a query with the learned key."""
        return self.head_dim if self.sink_bias in ("k", "kv") else 0

    def seen_keys(self, d_model: int, seq_len: int) -> float:
        return mean_keys(seq_len, None if self.window_size is None else self.window_size + self.num_sink_tokens)


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
        self.dtype, self.mask = ctx.compute_dtype, config.mask(ctx.causal)
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        self.slots = config.slots()
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        own_kv = config.shared_kv != "read"

        def projection(width: int, heads: int, axis: str) -> Dense:
            return Dense(ctx, d_model, width, (EMBED, axis), heads=(1, heads), use_bias=config.qkv_bias)

        def norm(width: int, axis: str) -> AnyNorm | None:
            if not config.qk_norm:
                return None
            dim, axis_of = (config.head_dim, None) if config.qk_norm_over == "head" else (width, axis)
            return make_norm(ctx, dim, eps=config.qk_norm_eps, axis=axis_of)

        self.q = projection(width, self.num_heads, HEADS)
        self.k = projection(kv_width, self.num_kv_heads, KV_HEADS) if own_kv else None
        self.v = projection(kv_width, self.num_kv_heads, KV_HEADS) if own_kv and not config.tie_kv else None
        heads = (0, self.num_heads)
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=heads, use_bias=config.o_bias)
        self.q_norm = norm(width, HEADS)
        self.k_norm = norm(kv_width, KV_HEADS) if own_kv else None
        self.v_norm = RMSNorm(ctx, config.head_dim, eps=config.qk_norm_eps, with_scale=False) if config.value_norm else None
        gate_width = {"elementwise": width, "headwise": self.num_heads}.get(config.gate or "")
        self.gate = Dense(ctx, d_model, gate_width, (EMBED, HEADS), role="gate") if gate_width else None
        self.positions = (
            None if config.positions is None else under("positions", config.positions.build, ctx, d_model, self.num_heads)
        )
        self.sinks = ctx.param(jax.nn.initializers.zeros, (self.num_heads,), (HEADS,)) if config.sink_logits else None
        learned = lambda: ctx.param(_SINK_INIT, (self.num_kv_heads, config.head_dim), (KV_HEADS, None))
        self.k_bias = learned() if config.sink_bias in ("k", "kv") else None
        self.v_bias = learned() if config.sink_bias in ("kv", "v") else None
        self.value_scale = ctx.param(jax.nn.initializers.zeros, (self.num_kv_heads,), (KV_HEADS,)) if config.value_scale else None
        self.sigmoid_bias = -math.log(ctx.seq_len) if config.normalizer == "sigmoid" else None
        first = jnp.asarray(ctx.layer_index == ctx.first_layers.get(VALUES, ctx.layer_index))
        self.value_mix = ctx.param(jax.nn.initializers.constant(0.5), (2,), (None,)) if config.value_residual else None
        self.is_first = Buffer(first, axes=()) if config.value_residual else None

    def project(self, x, *, at, state):
        placed = x if self.positions is None else self.positions.add(x, at)
        q = self._turned(self._heads(self.q(placed), self.num_heads, HEADS, self.q_norm), at)
        if self.config.log_n_scale is not None:
            growth = jnp.log(at.positions.astype(jnp.float32) + 1) / math.log(self.config.log_n_scale)
            q = (q * jnp.maximum(growth, 1)[..., None, None]).astype(q.dtype)
        if self.k is None:
            return QKV(q, None, None), state  # type: ignore[arg-type]
        keys = self.k(placed)
        k = self._turned(self._heads(keys, self.num_kv_heads, KV_HEADS, self.k_norm), at)
        values = keys if self.v is None else self.v(x)
        return QKV(q, k, self._scaled(self._heads(values, self.num_kv_heads, KV_HEADS, None))), state

    def _heads(self, y: jax.Array, number: int, axis: str, norm: AnyNorm | None) -> jax.Array:
        if norm is not None and self.config.qk_norm_over == "width":
            y = norm(y)
        y = constrain(split_heads(y, number), (BATCH, LENGTH, axis, None))
        return norm(y) if norm is not None and self.config.qk_norm_over == "head" else y

    def _turned(self, heads: jax.Array, at: Tokens) -> jax.Array:
        return heads if self.positions is None else self.positions.turn(heads, at)

    def _scaled(self, v: jax.Array) -> jax.Array:
        if self.v_norm is not None:
            v = self.v_norm(v)
        if self.value_scale is None:
            return v
        size = jnp.sum(jnp.square(v.astype(jnp.float32)), axis=-1, keepdims=True)
        constant = self.config.head_dim * jnp.exp(self.value_scale[...].astype(jnp.float32))
        return (v * (size / (size + constant[None, None, :, None]))).astype(v.dtype)

    def share(self, inputs, carry):
        if self.value_mix is not None and self.is_first is not None:
            first = jnp.where(self.is_first[...], inputs.v, carry.get(VALUES, inputs.v))
            own, old = self.value_mix[...].astype(jnp.float32)
            mixed = (own * inputs.v + old * first).astype(inputs.v.dtype)
            inputs, carry = inputs._replace(v=jnp.where(self.is_first[...], inputs.v, mixed)), {**carry, VALUES: first}
        if self.k_bias is not None and self.v_bias is not None:
            inputs = inputs._replace(v=inputs.v - self.v_bias[...].astype(inputs.v.dtype)[None, None])
        if self.config.shared_kv == "read":
            inputs = inputs._replace(k=carry[self.config.kv_name][0], v=carry[self.config.kv_name][1])
        elif self.config.shared_kv == "write":
            carry = {**carry, self.config.kv_name: (inputs.k, inputs.v)}
        return inputs, carry

    def recall(self, inputs, carry, *, at, state):
        if self.config.shared_kv == "read":
            cache = carry[self.config.kv_name]
        else:
            inputs, carry = self.share(inputs, carry)
            cache = state = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
            carry = {**carry, self.config.kv_name: cache} if self.config.shared_kv == "write" else carry
        return QKV(inputs.q, cache.entries["k"], cache.entries["v"], cache.at), carry, state

    def attend(self, inputs, *, at, state):
        o = attention(*inputs[:3], at=at, **self.options(inputs, at))
        if state is not None:
            state = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
        return o, state

    def attend_active(self, inputs, active, *, at):
        if self.config.normalizer != "softmax" or self.k_bias is not None:
            return super().attend_active(inputs, active, at=at)
        return routed_attention(
            inputs.q, inputs.k, inputs.v, active, at=at, sinks=self.sink_logits(inputs.q), **self.logit_options(at)
        )

    def attend_step(self, inputs, *, at, state):
        return attention(*inputs[:3], at=at, kv_at=inputs.kv_at, **self.options(inputs, at)), state

    def init_state(self, batch_size, max_len) -> Cache | None:
        if self.config.positions is not None:
            under("positions", self.config.positions.fit_length, max_len, "decoding")
        if self.config.shared_kv == "read":
            return None
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return self.slots.empty(batch_size, max_len, {"k": one, "v": one}, self.dtype)

    def finish(self, o, inputs, x):
        if self.v_bias is not None:
            v = jnp.repeat(self.v_bias[...], self.num_heads // self.num_kv_heads, axis=0)
            o = o + v.astype(o.dtype)[None, None]
        gate = self.output_gate(x)
        return o if gate is None else o * gate

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        """`[B, T, H, K or 1]`, or None."""
        return None if self.gate is None else jax.nn.sigmoid(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs, at))

    def observe(self, inputs, x, *, at):
        options: dict[str, Any] = {
            **self.logit_options(at),
            "at": at,
        }  # no sinks: shares of what the keys get, however little that is
        _, stats = attention(inputs.q, inputs.k, inputs.v, return_stats=True, **options, **self._normalizer)
        lse = stats.lse
        masses = functools.partial(first_masses, inputs.q, inputs.k, lse, **options, **self._normalizer)
        gate = self.output_gate(x)
        found = {"attention": stats, "first_masses": masses, "logit_map": self.logit_map()}
        found["gates"] = {} if gate is None else {"output": GateValues(gate, 1.0)}
        if self.config.normalizer == "softmax":
            found["column_mass"] = functools.partial(column_mass, inputs.q, inputs.k, lse, **options)
            found["logits"] = inputs.q, inputs.k, self.scale
        return found

    def logit_map(self) -> LogitMap | None:
        """What the logits are of the input; None where biases, norms, added positions or a window make them more than that."""
        config, place = self.config, self.config.positions
        more = config.qkv_bias or config.qk_norm or config.log_n_scale is not None or config.normalizer != "softmax"
        if more or self.k is None or not self.mask.sees_all or not isinstance(place, RotaryConfig | None):
            return None
        q, k = (split_heads(dense.weight(), heads) for dense, heads in ((self.q, self.num_heads), (self.k, self.num_kv_heads)))
        scale = self.scale * (1.0 if place is None else place.magnitude**2)
        return LogitMap(q, k, scale, turned=place is not None, causal=self.mask.causal)

    def clip(self, ratio, alpha):
        if self.config.unclipped is not None:
            return
        shared = self.num_kv_heads != self.num_heads or self.config.shared_kv is not None or self.config.tie_kv
        if self.k is None or shared:
            self.q.scale_outputs(jnp.repeat(ratio, self.config.head_dim, axis=-1))
        else:
            self.q.scale_outputs(jnp.repeat(ratio**alpha, self.config.head_dim, axis=-1))
            self.k.scale_outputs(jnp.repeat(ratio ** (1 - alpha), self.config.head_dim, axis=-1))

    def logit_options(self, at: Tokens, kv_at: Tokens | None = None) -> dict[str, Any]:
        """What makes the logits of queries at `at` and keys at `kv_at`, those of the same tokens by default: arguments of the ops."""
        bias = None if self.positions is None else self.positions.bias(at, at if kv_at is None else kv_at, scale=self.scale)
        return {"mask": self.mask, "scale": self.scale, "logit_soft_cap": self.config.logit_soft_cap, "bias": bias}

    def options(self, inputs: QKV, at: Tokens) -> dict[str, Any]:
        """What makes the weights: `logit_options`, the normaliser, and what joins it."""
        return {**self.logit_options(at, inputs.kv_at), **self._normalizer, "sinks": self.sink_logits(inputs.q)}

    def sink_logits(self, q: jax.Array) -> jax.Array | None:
        """What joins the denominators: `[H]`, or `[B, T, H]` where a learned key does, or None."""
        sinks = None if self.sinks is None else self.sinks[...]
        if self.k_bias is None:
            return sinks
        grouped = q.reshape(*q.shape[:2], self.num_kv_heads, -1, q.shape[-1])
        k = self.k_bias[...].astype(q.dtype)
        z = self.scale * jnp.einsum("btgrk,gk->btgr", grouped, k, preferred_element_type=jnp.float32)
        z = capped(z, self.config.logit_soft_cap).reshape(q.shape[:3])
        return z if sinks is None else jnp.logaddexp(z, sinks.astype(z.dtype)[None, None])

    @property
    def _normalizer(self) -> dict[str, Any]:
        return {"normalizer": self.config.normalizer, "sigmoid_bias": self.sigmoid_bias}

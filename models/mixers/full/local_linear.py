"""What local linear attention and Parallax share: projections, the cache, and the op that corrects softmax attention to first order."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from plait.configs.domains import Base, Channels, Heads
from plait.kernels import Mask, Tokens, local_linear, local_linear_rows
from plait.kernels.local_linear import pair_products
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.cache import Cache, Slots
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig
from plait.models.mixers.heads import join_heads, require_divides, resolve_heads, split_heads
from plait.models.norms import RMSNorm
from plait.models.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalLinearConfig(MixerConfig):
    """Options of both."""

    directions = ("causal", "bidirectional")
    solves: ClassVar[bool]
    """Whether the probe is solved for."""

    num_heads: Heads | None = None
    """Query heads; None gives d_model / head_dim."""
    num_kv_heads: Heads | None = None
    """Key and value heads, a divisor of num_heads; None gives num_heads."""
    head_dim: Channels = 64
    """Channels of a head."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding of queries, keys and probes; None for no position encoding."""
    qk_norm: bool = False
    """RMS-normalise queries, keys and probes per head before the rotary embedding, with a learned gain."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for NoPE"
            )

    @classmethod
    def example(cls):
        return cls(num_heads=4, head_dim=16)

    def heads(self, d_model: int) -> tuple[int, int]:
        """`(num_heads, num_kv_heads)` at width `d_model`."""
        num_heads = resolve_heads(self.num_heads, d_model, self.head_dim)
        num_kv_heads = self.num_kv_heads or num_heads
        require_divides(("num_kv_heads", num_kv_heads), ("num_heads", num_heads))
        return num_heads, num_kv_heads

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        pair = 2.0 * pair_products(self.head_dim, self.head_dim, solves=self.solves)
        return pair * self.heads(d_model)[0] * (seq_len + 1) / 2


class ProbedQKV(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, S, Hkv, K]
    v: jax.Array  # [B, S, Hkv, K]
    probe: Any = None  # [B, T, H, K], or None where the op solves for it
    kv_at: Tokens | None = None  # where the keys stand, when they are not the queries' own tokens


class LocalLinear(HeadMixer):
    """`o_i = E_i v - Cov_i(v, k) r_i`, means under softmax attention's weights; subclasses make the probe r, or set the `ridge`."""

    ridge: float | None = None

    def __init__(self, config: LocalLinearConfig, d_model: int, ctx: BuildContext):
        self.config, self.dtype, self.slots = config, ctx.compute_dtype, Slots()
        self.num_heads, self.num_kv_heads = config.heads(d_model)
        self.mask = Mask(causal=ctx.causal)
        width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        self.q = Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads))
        self.k, self.v = (Dense(ctx, d_model, kv_width, (EMBED, KV_HEADS), heads=(1, self.num_kv_heads)) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(ctx, config.head_dim, eps=1e-6) if config.qk_norm else None for _ in range(2))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def probe(self, x: jax.Array, at: Tokens) -> jax.Array | None:
        """r `[B, T, H, K]`."""
        return None

    def turned(self, dense: Dense, norm: RMSNorm | None, x: jax.Array, at: Tokens, axis: str = HEADS) -> jax.Array:
        """A projection by head, normalised and rotated."""
        y = split_heads(dense(x), self.num_heads if axis == HEADS else self.num_kv_heads)
        y = constrain(y, (BATCH, LENGTH, axis, None))
        y = y if norm is None else norm(y)
        return y if self.config.rope_theta is None else rotate(y, at.positions, self.config.rope_theta)

    def project(self, x, *, at, state):
        q, k = self.turned(self.q, self.q_norm, x, at), self.turned(self.k, self.k_norm, x, at, KV_HEADS)
        return ProbedQKV(q, k, split_heads(self.v(x), self.num_kv_heads), self.probe(x, at)), state

    def recall(self, inputs, carry, *, at, state):
        cache = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
        return inputs._replace(k=cache.entries["k"], v=cache.entries["v"], kv_at=cache.at), carry, cache

    def attend(self, inputs, *, at, state):
        o, _ = self.attend_step(inputs, at=at, state=state)
        return o, None if state is None else self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)

    def attend_step(self, inputs, *, at, state):
        options = {"mask": self.mask, "probe": inputs.probe, "ridge": self.ridge, "at": at, "kv_at": inputs.kv_at}
        return local_linear(*inputs[:3], **options), state

    def init_state(self, batch_size, max_len) -> Cache:
        one = ((self.num_kv_heads, self.config.head_dim), KV_HEADS)
        return self.slots.empty(batch_size, max_len, {"k": one, "v": one}, self.dtype)

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return local_linear_rows(inputs.q, inputs.k, rows, mask=self.mask, probe=inputs.probe, ridge=self.ridge, at=at)

"""Multi-head latent attention: keys and values of all heads come from one small latent, which alone is cached."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Base, Channels, Epsilon, Heads
from plait.kernels import Mask, Tokens, attention, attention_rows, column_mass, first_masses
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.cache import Slots
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.norms import RMSNorm
from plait.models.rope import rotate


@register(
    "mla",
    kind="full",
    source="DeepSeek-V2 (2405.04434)",
    proof="transformers: DeepSeek-V3",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(MixerConfig):
    """`z_ij = (q_nope_i . k_nope_j + q_rope_i . k_rope_j) / sqrt(nope_head_dim + rope_head_dim)`, `[k_nope, v] = W_UKV c`.

    `c = norm(W_DKV x)` is cached with the one rotated key `k_rope` that all heads share; decoding folds W_UK into the queries and W_UV
    into the outputs, and attends to the latents themselves.
    """

    num_heads: Heads = 16
    """Heads."""
    kv_rank: Channels = 512
    """Channels of the cached latent."""
    q_rank: Channels | None = None
    """Channels of the queries' latent; None projects queries from the residual stream."""
    nope_head_dim: Channels = 128
    """Channels of a query and key head without position."""
    rope_head_dim: Channels = 64
    """Rotated channels of a query head, and of the key that all heads share."""
    v_head_dim: Channels = 128
    """Channels of a value head."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding; None rotates nothing (NoPE, as in Kimi Linear)."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norms of the latents."""

    def check(self) -> None:
        if self.rope_head_dim % 2:
            raise ValueError(
                f"rope_head_dim={self.rope_head_dim} must be even, as channels are rotated in pairs; use {self.rope_head_dim + 1}"
            )

    @classmethod
    def example(cls) -> MLAConfig:
        return cls(num_heads=4, kv_rank=24, q_rank=32, nope_head_dim=16, rope_head_dim=8, v_head_dim=12)

    def build(self, d_model: int, ctx: BuildContext) -> MLA:
        return MLA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        channels = self.nope_head_dim + self.rope_head_dim + self.v_head_dim
        return 2.0 * self.num_heads * channels * (seq_len + 1) / 2


class MLAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, nope + rope]; absorbed, [B, T, H, kv_rank + rope]
    k: jax.Array  # [B, S, H, nope + rope]; absorbed, one head of latents and rotated keys
    v: jax.Array  # [B, S, H, V]; absorbed, one head of latents
    latent: jax.Array  # [B, T, kv_rank]
    k_rope: jax.Array  # [B, T, rope]
    kv_at: Tokens | None = None  # where the keys stand, when they are a cache's


class MLA(HeadMixer):
    """See `MLAConfig`."""

    def __init__(self, config: MLAConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads, self.dtype = config, config.num_heads, ctx.compute_dtype
        self.scale = (config.nope_head_dim + config.rope_head_dim) ** -0.5
        heads = (1, self.num_heads)
        self.q_down = Dense(ctx, d_model, config.q_rank, (EMBED, None)) if config.q_rank is not None else None
        self.q_norm = RMSNorm(ctx, config.q_rank, eps=config.norm_eps) if config.q_rank is not None else None
        q_width = self.num_heads * (config.nope_head_dim + config.rope_head_dim)
        self.q = Dense(ctx, config.q_rank or d_model, q_width, (EMBED if config.q_rank is None else None, HEADS), heads=heads)
        self.kv_down = Dense(ctx, d_model, config.kv_rank, (EMBED, None))
        self.k_rope = Dense(ctx, d_model, config.rope_head_dim, (EMBED, None))
        self.kv_norm = RMSNorm(ctx, config.kv_rank, eps=config.norm_eps)
        self.k_up = Dense(ctx, config.kv_rank, self.num_heads * config.nope_head_dim, (None, HEADS), heads=heads)
        self.v_up = Dense(ctx, config.kv_rank, self.num_heads * config.v_head_dim, (None, HEADS), heads=heads)
        self.o = Dense(
            ctx, self.num_heads * config.v_head_dim, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads)
        )
        self.slots = Slots()

    def _latents(self, x: jax.Array, at: Tokens) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries without and with position `[B, T, H, .]`, the latent and the shared rotated key `[B, T, .]`."""
        queries = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = constrain(split_heads(self.q(queries), self.num_heads), (BATCH, LENGTH, HEADS, None))
        q_nope, q_rope = jnp.split(q, [self.config.nope_head_dim], axis=-1)
        k_rope = self.k_rope(x)[:, :, None]
        if self.config.rope_theta is not None:
            q_rope, k_rope = (rotate(y, at.positions, self.config.rope_theta) for y in (q_rope, k_rope))
        return q_nope, q_rope, self.kv_norm(self.kv_down(x)), k_rope[:, :, 0]

    def project(self, x, *, at, state):
        q_nope, q_rope, latent, k_rope = self._latents(x, at)
        k_nope, v = (
            constrain(split_heads(dense(latent), self.num_heads), (BATCH, LENGTH, HEADS, None))
            for dense in (self.k_up, self.v_up)
        )
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, shared], -1)
        return MLAInputs(q, k, v, latent, k_rope), state

    def project_step(self, x, *, at, state):
        q_nope, q_rope, latent, k_rope = self._latents(x, at)
        q = jnp.einsum("bthk,chk->bthc", q_nope, self._up(self.k_up))
        state = self.slots.write(state, {"latent": latent, "k_rope": k_rope}, at)
        latents = state.entries["latent"][:, :, None]
        k = jnp.concatenate([latents, state.entries["k_rope"][:, :, None]], -1)
        return MLAInputs(jnp.concatenate([q, q_rope], -1), k, latents, latent, k_rope, state.at), state

    def attend(self, inputs, *, at, state):
        o = attention(inputs.q, inputs.k, inputs.v, mask=Mask(causal=True), scale=self.scale, at=at)
        if state is not None:
            state = self.slots.write(state, {"latent": inputs.latent, "k_rope": inputs.k_rope}, at)
        return o, state

    def attend_step(self, inputs, *, at, state):
        o = attention(inputs.q, inputs.k, inputs.v, mask=Mask(causal=True), scale=self.scale, at=at, kv_at=inputs.kv_at)
        return jnp.einsum("bthc,chv->bthv", o, self._up(self.v_up)), state

    def _up(self, dense: Dense) -> jax.Array:
        """`[kv_rank, H, .]` in the compute dtype."""
        return split_heads(dense.weight().astype(self.dtype), self.num_heads)

    def init_state(self, batch_size, max_len):
        entries = {"latent": ((self.config.kv_rank,), None), "k_rope": ((self.config.rope_head_dim,), None)}
        return self.slots.empty(batch_size, max_len, entries, self.dtype)

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, mask=Mask(causal=True), scale=self.scale, at=at)

    def observe(self, inputs, x, *, at):
        options: dict[str, Any] = {"mask": Mask(causal=True), "scale": self.scale, "at": at}
        _, stats = attention(inputs.q, inputs.k, inputs.v, return_stats=True, **options)
        masses = {
            op.__name__: functools.partial(op, inputs.q, inputs.k, stats.lse, **options) for op in (first_masses, column_mass)
        }
        return {"attention": stats, **masses}

"""Retention: a state that fades at a fixed rate, another for each head."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels import Tokens, decay, decay_rows
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, require_divides, require_positive, split_heads
from plait.models.mixers.stats import recurrent_statistics
from plait.models.norms import RMSNorm
from plait.models.rope import rotate


@register("retnet", kind="linear", source="Retentive Network: A Successor to Transformer for Large Language Models (2307.08621)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """`S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)` in head h = 0, 1, ..., with q and k rotated."""

    num_heads: int = 4
    """Heads; the state of each is (d_model / num_heads) x (expand_v d_model / num_heads)."""
    expand_v: float = 2.0
    """Total value width over d_model."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-5
    """Epsilon of the per-head output norm."""

    def __post_init__(self) -> None:
        path = f"model.mixers.{self.name}"
        require_positive(path, num_heads=self.num_heads)
        if self.rope_theta <= 0:
            raise ValueError(f"{path}.rope_theta={self.rope_theta} must be positive")

    def head_dims(self, d_model: int) -> tuple[int, int]:
        """Key and value channels of a head at width `d_model`."""
        path, value_width = f"model.mixers.{self.name}", int(d_model * self.expand_v)
        require_divides(path, ("2 * num_heads", 2 * self.num_heads), ("d_model", d_model))  # channels are rotated in pairs
        require_divides(path, ("num_heads", self.num_heads), ("expand_v * d_model", value_width))
        return d_model // self.num_heads, value_width // self.num_heads

    def build(self, d_model: int, ctx: BuildContext) -> RetNet:
        return RetNet(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        key_dim, value_dim = self.head_dims(d_model)
        return 4.0 * self.num_heads * key_dim * value_dim


class RetNetState(NamedTuple):
    memory: jax.Array  # [B, H, K, V] float32


class RetNetInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K]
    v: jax.Array  # [B, T, H, V]
    g: jax.Array  # [B, T, H] float32, the same at every token


class RetNet(HeadMixer):
    """See `RetNetConfig`."""

    def __init__(self, config: RetNetConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.num_heads
        self.head_dims = config.head_dims(d_model)
        value_width = self.num_heads * self.head_dims[1]
        self.q = Dense(ctx, d_model, d_model, (EMBED, HEADS))
        self.k = Dense(ctx, d_model, d_model, (EMBED, HEADS))
        self.v = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.gate = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.norm = RMSNorm(ctx, self.head_dims[1], eps=config.norm_eps)
        self.o = Dense(ctx, value_width, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def project(self, x, *, segment_ids, positions, state):
        heads = lambda y: constrain(split_heads(y, self.num_heads), (BATCH, LENGTH, HEADS, None))
        q, k = (rotate(heads(dense(x)), positions, self.config.rope_theta) for dense in (self.q, self.k))
        g = np.log1p(-(2.0 ** (-5.0 - np.arange(self.num_heads))))
        g = jnp.broadcast_to(jnp.asarray(g, jnp.float32)[None, None], (*x.shape[:2], self.num_heads))
        return RetNetInputs(q, k, heads(self.v(x)), g), state

    def attend(self, inputs, *, segment_ids, positions, state):
        o, memory = decay(*inputs, initial_state=None if state is None else state.memory, at=Tokens(None, segment_ids))
        return o, None if state is None else RetNetState(memory)

    def init_state(self, batch_size, max_len):
        memory = jnp.zeros((batch_size, self.num_heads, *self.head_dims), jnp.float32)
        return RetNetState(constrain(memory, (BATCH, HEADS, None, None)))

    def finish(self, o, x):
        return self.norm(o) * jax.nn.silu(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, segment_ids, positions):
        return decay_rows(inputs.q, inputs.k, inputs.g, rows=rows, at=Tokens(None, segment_ids))

    def observe(self, inputs, x, *, segment_ids, positions):
        _, memory, stats = decay(*inputs, at=Tokens(None, segment_ids), return_stats=True)
        return recurrent_statistics(stats, state=memory, segment_ids=segment_ids)

"""Gated linear attention: a decay for every key channel, from the data."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, decay, decay_rows
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.heads import join_heads, require_divides, require_positive, split_heads
from plait.models.mixers.stats import recurrent_statistics
from plait.models.norms import RMSNorm


@register("gla", kind="linear", source="Gated Linear Attention Transformers with Hardware-Efficient Training (2312.06635)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    """`S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, `g = logsigmoid(W2 W1 x + b) / gate_normalizer`."""

    num_heads: int = 4
    """Heads; the state of each is (expand_k d_model / num_heads) x (expand_v d_model / num_heads)."""
    expand_k: float = 0.5
    """Total key width over d_model."""
    expand_v: float = 1.0
    """Total value width over d_model."""
    gate_rank: int = 16
    """Inner width of the decay's low-rank projection."""
    gate_normalizer: float = 16.0
    """Divides the log decay: larger remembers longer at the start of training."""
    norm_eps: float = 1e-5
    """Epsilon of the per-head output norm."""

    def __post_init__(self) -> None:
        path = f"model.mixers.{self.name}"
        require_positive(path, num_heads=self.num_heads, gate_rank=self.gate_rank)
        if self.gate_normalizer <= 0:
            raise ValueError(f"{path}.gate_normalizer={self.gate_normalizer} must be positive")

    def widths(self, d_model: int) -> tuple[int, int]:
        """Total key and value width at `d_model`."""
        key_width, value_width = int(d_model * self.expand_k), int(d_model * self.expand_v)
        for name, width in (("expand_k", key_width), ("expand_v", value_width)):
            require_divides(f"model.mixers.{self.name}", ("num_heads", self.num_heads), (f"{name} * d_model", width))
        return key_width, value_width

    def build(self, d_model: int, ctx: BuildContext) -> GLA:
        return GLA(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        key_width, value_width = self.widths(d_model)
        return 4.0 * key_width * value_width / self.num_heads


class GLAState(NamedTuple):
    memory: jax.Array  # [B, H, K, V] float32


class GLAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K]
    v: jax.Array  # [B, T, H, V]
    g: jax.Array  # [B, T, H, K] float32, at most 0


class GLA(HeadMixer):
    """See `GLAConfig`."""

    def __init__(self, config: GLAConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads = config, config.num_heads
        key_width, value_width = config.widths(d_model)
        self.head_dims = key_width // self.num_heads, value_width // self.num_heads
        self.q = Dense(ctx, d_model, key_width, (EMBED, HEADS))
        self.k = Dense(ctx, d_model, key_width, (EMBED, HEADS))
        self.v = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.decay_down = Dense(ctx, d_model, config.gate_rank, (EMBED, None))
        self.decay_up = Dense(ctx, config.gate_rank, key_width, (None, HEADS), use_bias=True)
        self.gate = Dense(ctx, d_model, value_width, (EMBED, HEADS))
        self.norm = RMSNorm(ctx, self.head_dims[1], eps=config.norm_eps)
        self.o = Dense(ctx, value_width, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def project(self, x, *, segment_ids, positions, state):
        heads = lambda y: constrain(split_heads(y, self.num_heads), (BATCH, LENGTH, HEADS, None))
        logits = heads(self.decay_up(self.decay_down(x))).astype(jnp.float32)
        g = jax.nn.log_sigmoid(logits) / self.config.gate_normalizer
        return GLAInputs(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), g), state

    def attend(self, inputs, *, segment_ids, positions, state):
        o, memory = decay(*inputs, initial_state=None if state is None else state.memory, at=Tokens(None, segment_ids))
        return o, None if state is None else GLAState(memory)

    def init_state(self, batch_size, max_len):
        memory = jnp.zeros((batch_size, self.num_heads, *self.head_dims), jnp.float32)
        return GLAState(constrain(memory, (BATCH, HEADS, None, None)))

    def finish(self, o, x):
        return self.norm(o) * jax.nn.silu(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, segment_ids, positions):
        return decay_rows(inputs.q, inputs.k, inputs.g, rows=rows, at=Tokens(None, segment_ids))

    def observe(self, inputs, x, *, segment_ids, positions):
        _, memory, stats = decay(*inputs, at=Tokens(None, segment_ids), return_stats=True)
        return recurrent_statistics(stats, state=memory, segment_ids=segment_ids)

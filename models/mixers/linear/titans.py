"""What the three Titans share: the neural memory with momentum, and attention that also sees learned, persistent tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Base, Depth, SomeSpan
from plait.kernels import Mask, attention, attention_rows
from plait.kernels.chunking import dot
from plait.kernels.online_memory import Rule
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Slots
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import HeadKind, HeadMixer
from plait.models.mixers.full.softmax import QKV
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.mixers.linear.neural_memory import Gate, MemoryConfig, MemoryHeads
from plait.models.positions.rope import rotate

TITLE = "Titans: Learning to Memorize at Test Time (2501.00663)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansConfig(MemoryConfig):
    """`S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2`, `M_t = (1 - alpha_t) M_{t-1} + S_t`, and a read is `M_t(q_t)`.

    alpha and eta are sigmoids of x, one a head and token, and theta is a third times `(1 - eta_t) / chunk_size`: the gradients of a chunk,
    which are taken at one memory, and of those before it move the memory by their mean, not by their sum, under which memories
    diverge where keys resemble each other. The paper leaves theta's form open. Persistent tokens are keys and values that every query of
    the attention sees, without a position. What they would teach the memory at each start of a document is in what it begins with, which
    is learned.
    """

    memory_depth: Depth = 2
    """Layers of a memory, with GELU between them; 1 is linear."""
    num_persistent: SomeSpan = 4
    """Persistent tokens."""
    rope_theta: Base | None = 10_000.0
    """Base of the rotary embedding of the attention, of which the paper does not speak; None for none."""

    def check(self) -> None:
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even where rope_theta={self.rope_theta} rotates channels in pairs; "
                f"use {self.head_dim + 1}, or rope_theta=None for no positions"
            )

    @property
    def layers(self) -> int:
        return self.memory_depth

    @property
    def rule(self) -> Rule:
        return Rule(chunk_size=self.chunk_size)

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        heads = self.heads(d_model)
        attend: tuple[HeadKind, ...] = ("attention",)
        remember: tuple[HeadKind, ...] = ("state",)
        return attend * heads + remember * heads

    def attention_flops(self, d_model: int, seq_len: int, keys: float) -> float:
        """Operations per token of attention to so many keys and to the persistent ones, which are projected once a sequence."""
        width = self.heads(d_model) * self.head_dim
        return 4.0 * width * (keys + self.num_persistent + self.num_persistent * d_model / seq_len)


def mean_keys(window_size: int, seq_len: int) -> float:
    """Keys in the window of a query, the mean over a sequence."""
    most = min(seq_len, window_size)
    return most - most * (most - 1) / 2 / seq_len


class TitansMemory(MemoryHeads):
    """The neural memory. Begins with alpha near 0.02, eta at 1/2 and the third sigmoid near 0.12, of which the paper does not speak."""

    def __init__(self, config: TitansConfig, d_model: int, ctx: BuildContext):
        self.memories(config, d_model, ctx, momentum=True)
        self.forget, self.surprise, self.learning = (
            Gate(ctx, d_model, (self.num_heads,), start=start) for start in (-4.0, 0.0, -2.0)
        )

    def gates(self, x):
        surprise = self.surprise(x)
        return {
            "g": jax.nn.log_sigmoid(-self.forget(x)),
            "step": jax.nn.sigmoid(self.learning(x)) * jax.nn.sigmoid(-surprise) / self.rule.chunk_size,
            "momentum": jax.nn.log_sigmoid(surprise),
        }

    def finish(self, o, inputs, x):
        return o


class PersistentAttention(HeadMixer):
    """Softmax attention in a sliding window, whose queries also see the persistent tokens."""

    def __init__(self, config: TitansConfig, d_model: int, ctx: BuildContext, window_size: int):
        self.num_heads, self.theta, self.dtype = config.heads(d_model), config.rope_theta, ctx.compute_dtype
        self.head_dim, self.mask, self.slots = config.head_dim, Mask(window_size=window_size), Slots(window_size)
        width = self.num_heads * config.head_dim
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        init = jax.nn.initializers.normal(1.0)
        self.persistent = ctx.param(init, (config.num_persistent, d_model), (None, None), role="vector")

    def project(self, x, *, at, state):
        q, k, v = (
            constrain(split_heads(dense(x), self.num_heads), (BATCH, LENGTH, HEADS, None)) for dense in (self.q, self.k, self.v)
        )
        return QKV(q, k if self.theta is None else rotate(k, at.positions, self.theta), v), state

    def _attend(self, q, k, v, at, kv_at):
        """Attention to keys, and to the persistent ones in the same softmax: two means, weighed by their normalisers."""
        turned = q if self.theta is None else rotate(q, at.positions, self.theta)
        o, lse = attention(turned, k, v, mask=self.mask, at=at, kv_at=kv_at, return_lse=True)
        if not self.persistent.shape[0]:
            return o, None
        logits, values = self._persistent(q)
        total = jax.nn.logsumexp(logits, axis=-1)
        share = jax.nn.sigmoid(lse - total)[..., None]  # [B, T, H, 1]
        mean = dot("bthp,phv->bthv", jnp.exp(logits - total[..., None]), values)
        return (share * o + (1 - share) * mean).astype(o.dtype), share

    def _persistent(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits `[B, T, H, P]` and values `[P, H, V]` of the persistent tokens, float32."""
        k, v = (split_heads(dense(self.persistent[...]), self.num_heads).astype(jnp.float32) for dense in (self.k, self.v))
        return dot("bthk,phk->bthp", q.astype(jnp.float32), k) * self.head_dim**-0.5, v

    def attend(self, inputs, *, at, state):
        o, _ = self._attend(inputs.q, inputs.k, inputs.v, at, None)
        return o, None if state is None else self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)

    def attend_step(self, inputs, *, at, state):
        state = self.slots.write(state, {"k": inputs.k, "v": inputs.v}, at)
        o, _ = self._attend(inputs.q, state.entries["k"], state.entries["v"], at, state.at)
        return o, state

    def implied(self, inputs, rows, *, at):
        q, k, v = inputs[:3]
        turned = q if self.theta is None else rotate(q, at.positions, self.theta)
        weights = attention_rows(turned, k, rows=rows, at=at, mask=self.mask)
        _, share = self._attend(q, k, v, at, None)
        return weights if share is None else weights * jnp.moveaxis(share[:, rows], 1, 2)

    def output(self, o):
        return join_heads(o)

    def init_state(self, batch_size, max_len):
        one = ((self.num_heads, self.head_dim), HEADS)
        return self.slots.empty(batch_size, max_len, {"k": one, "v": one}, self.dtype)


class MemoryGate(nnx.Module):
    """`W (norm(y) * sigmoid(norm(m)))`, y what attention gives and m what the memory does, the norms with a learned scale each."""

    def __init__(self, config: TitansConfig, d_model: int, ctx: BuildContext, width: int):
        self.y_norm, self.memory_norm = (RMSNorm(ctx, width, eps=config.norm_eps, axis=HEADS) for _ in range(2))
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init)

    def __call__(self, y: jax.Array, memory: jax.Array) -> jax.Array:
        return self.o(self.y_norm(y) * jax.nn.sigmoid(self.memory_norm(memory)))

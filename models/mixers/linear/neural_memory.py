"""What Titans and Miras share: heads that are small networks, which learn the keys and values of the tokens they have read."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.domains import Channels, Epsilon, Factor, Heads, Span, Taps
from plait.kernels import online_memory
from plait.kernels.online_memory import MemoryState, Rule, empty_memory
from plait.kernels.recurrence import RecurrenceStats
from plait.kernels.shapes import l2_normalize
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext, fan_in_normal
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.layers.short_conv import Convolving, ShortConv
from plait.models.looks.look import GateValues
from plait.models.mixers.base import HeadMixer, MixerConfig
from plait.models.mixers.heads import join_heads, resolve_heads, split_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(MixerConfig):
    """Options of a mixer whose heads learn while they read."""

    opaque: ClassVar[str | None] = (
        "a value moves the weights of a network, by a gradient that depends on it and on those before it"
    )

    num_heads: Heads | None = None
    """Heads, each a memory of its own; None gives d_model / head_dim. The papers write one memory, of the width of the model."""
    head_dim: Channels = 64
    """Channels of a key and a value."""
    expand: Factor = 4.0
    """Units between two layers of a memory over head_dim."""
    conv_size: Taps = 4
    """Taps of the short convolutions on q, k and v."""
    chunk_size: Span = 64
    """Tokens of a document whose gradients are taken at one memory, that before the first of them; 1 is the recurrence itself."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the norms."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before, between and after the layers of a memory."""
        hidden = max(1, int(self.head_dim * self.expand))
        return (self.head_dim, *(hidden,) * (self.layers - 1), self.head_dim)

    @property
    @abc.abstractmethod
    def layers(self) -> int:
        """Layers of a memory."""

    @property
    @abc.abstractmethod
    def rule(self) -> Rule:
        """What a memory is and how it learns."""

    def heads(self, d_model: int) -> int:
        """Heads at width `d_model`."""
        return resolve_heads(self.num_heads, d_model, self.head_dim)

    def memory_flops(self, d_model: int) -> float:
        """Operations per token of convolutions and memories: an answer to the key, its gradient in weights and units, a read."""
        sizes = [before * after for before, after in itertools.pairwise(self.widths)]
        heads = self.heads(d_model)
        return heads * (6.0 * sum(sizes) + 2.0 * sum(sizes[1:])) + 6.0 * self.conv_size * heads * self.head_dim

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.memory_flops(d_model)


class MemoryInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K], unit norm
    k: jax.Array  # [B, T, H, K], unit norm
    v: jax.Array  # [B, T, H, K]
    g: jax.Array  # [B, T, H] or [B, T, H, K] float32, at most 0
    step: jax.Array  # as g, above 0
    momentum: jax.Array | None = None  # [B, T, H] float32, at most 0
    threshold: jax.Array | None = None  # [B, T, H] float32


class LearnedState(NamedTuple):
    """Decode memory: what the memories have learned, and the last inputs of each convolution."""

    memory: MemoryState
    convs: Mapping[str, jax.Array]


class Gate(nnx.Module):
    """Numbers `[B, T, H]` or `[B, T, H, K]` from the layer's input, float32 before their nonlinearity: `(W_2) W_1 x + b`."""

    def __init__(self, ctx: BuildContext, d_model: int, shape: tuple[int, ...], *, start: float, rank: int | None = None):
        """Args: `shape` is (H,) or (H, K); `start` what the bias begins with; `rank` the inner width of two projections."""
        width, self.shape = math.prod(shape), shape
        self.down = None if rank is None else Dense(ctx, d_model, rank, (EMBED, None), role="gate")
        axes = (EMBED if rank is None else None, HEADS)
        self.up = Dense(ctx, d_model if rank is None else rank, width, axes, role="gate")
        self.bias = ctx.param(jax.nn.initializers.constant(start), (width,), (HEADS,), role="decay")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.up(x if self.down is None else self.down(x)).astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)[None, None]).reshape(*x.shape[:-1], *self.shape)


class MemoryHeads(Convolving, HeadMixer):
    """Heads that read a memory, which each token moves first. Subclasses call `memories`, and write `gates`; see `output` too."""

    convs = ("q_conv", "k_conv", "v_conv")

    def memories(
        self,
        config: MemoryConfig,
        d_model: int,
        ctx: BuildContext,
        *,
        momentum: bool = False,
        init: Callable[..., Any] | None = None,
    ) -> None:
        """Makes the projections to q, k and v with their convolutions, and the memories that a document begins with."""
        self.num_heads, self.rule, self.with_momentum = config.heads(d_model), config.rule, momentum
        width = self.num_heads * config.head_dim
        self.q, self.k, self.v = (Dense(ctx, d_model, width, (EMBED, HEADS), heads=(1, self.num_heads)) for _ in range(3))
        self.q_conv, self.k_conv, self.v_conv = (ShortConv(ctx, width, size=config.conv_size, axis=HEADS) for _ in range(3))
        layers = itertools.pairwise(config.widths)
        one = lambda sizes: ctx.param(init or fan_in_normal(), (self.num_heads, *sizes), (HEADS, None, None))
        self.initial = nnx.List([one(sizes) for sizes in layers])

    def gated_output(self, ctx: BuildContext, d_model: int, config: MemoryConfig) -> None:
        """Makes the norm and the gate of what is read, and the projection back."""
        width = self.num_heads * config.head_dim
        self.norm = RMSNorm(ctx, config.head_dim, eps=config.norm_eps)
        self.gate = Dense(ctx, d_model, width, (EMBED, HEADS), role="gate")
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    @abc.abstractmethod
    def gates(self, x: jax.Array) -> dict[str, jax.Array]:
        """The fields of `MemoryInputs` besides q, k and v."""

    def project(self, x, *, at, state):
        streams = {"q_conv": self.q(x), "k_conv": self.k(x), "v_conv": self.v(x)}
        found, state = self.convolve(streams, at=at, state=state)
        q, k, v = (constrain(split_heads(y, self.num_heads), (BATCH, LENGTH, HEADS, None)) for y in found)
        return MemoryInputs(l2_normalize(q), l2_normalize(k), v, **self.gates(x)), state

    def _learn(self, inputs: MemoryInputs, state: MemoryState | None, at: Any) -> tuple[jax.Array, MemoryState, jax.Array]:
        return online_memory(
            *inputs[:5],
            momentum=inputs.momentum,
            threshold=inputs.threshold,
            initial=tuple(w[...] for w in self.initial),
            rule=self.rule,
            initial_state=state,
            at=at,
        )

    def attend(self, inputs, *, at, state):
        o, memory, _ = self._learn(inputs, None if state is None else state.memory, at)
        return o, None if state is None else state._replace(memory=memory)

    def implied(self, inputs, rows, *, at):
        return None

    def finish(self, o, inputs, x):
        return self.norm(o) * jax.nn.silu(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def init_state(self, batch_size, max_len):
        memory = empty_memory(tuple(self.initial), batch_size, self.with_momentum)  # type: ignore[arg-type]
        return LearnedState(memory, self.empty_convs(batch_size))

    def observe(self, inputs, x, *, at):
        """What the memories hold at the end, all layers as one row, and how they decay and learn, over the sequence."""
        _, state, written = self._learn(inputs, None, at)
        batch, heads = written.shape[0], self.num_heads
        memory = jnp.concatenate([w.reshape(batch, heads, 1, -1) for w in state.accumulated], axis=-1)
        real = (at.segment_ids > 0)[..., None]
        count = jnp.broadcast_to(real.sum(1, keepdims=True).astype(jnp.float32), (batch, 1, heads))
        decay = -inputs.g if inputs.g.ndim == 3 else -inputs.g.mean(-1)
        mean = lambda y: jnp.where(real, y, 0).sum(1, keepdims=True) / jnp.maximum(count, 1.0)
        norm = jnp.linalg.norm(memory, axis=(-2, -1))[:, None]
        stats = RecurrenceStats(norm, mean(written), 1.0 / jnp.maximum(mean(decay), 1e-9), count)
        gates = {"decay": GateValues(jnp.exp(inputs.g), 1.0)}
        return {**jax.lax.stop_gradient({"memory": memory, "recurrence": stats}), "gates": gates}

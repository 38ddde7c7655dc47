"""What mixers share whose channels are states of their own, each with its own decay."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, linear_scan
from plait.kernels.recurrence import SLOWEST, RecurrenceStats
from plait.models.mixers.linear.recurrent import Recurrent

OPAQUE = "every channel weighs tokens by itself, so that a head's channels share no attention"


class Channelwise(Recurrent):
    """Heads of channels that each decay on their own; a head's memory is `[K, V]`, K numbers for each of V channels."""

    @abc.abstractmethod
    def scan(self, inputs: Any, memory: jax.Array | None, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """What is read `[B, T, H, V]`, and the memory `[B, H, K, V]` after the last token."""

    @abc.abstractmethod
    def rates(self, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """The norm of what each token writes, and the mean of -g over channels, both `[B, T, H]` float32."""

    def attend(self, inputs, *, at, state):
        o, memory = self.scan(inputs, None if state is None else state.memory, at=at)
        return o, None if state is None else state._replace(memory=memory)

    def implied(self, inputs, rows, *, at):
        return None

    def observe(self, inputs, x, *, at):
        _, memory = self.scan(inputs, None, at=at)
        real = (at.segment_ids > 0)[..., None]
        count = real.sum(1, keepdims=True).astype(jnp.float32)
        writes, rates = (jnp.where(real, y, 0).sum(1, keepdims=True) / jnp.maximum(count, 1) for y in self.rates(inputs))
        norm = jnp.linalg.norm(memory, axis=(-2, -1))[:, None]
        horizon = 1 / jnp.maximum(rates, SLOWEST)
        stats = RecurrenceStats(norm, writes, horizon, jnp.broadcast_to(count, norm.shape))  # all tokens are one span
        return {"memory": memory, "recurrence": stats, "gates": self.gates_told(inputs, x)}


class Scanned(Channelwise):
    """`h_t = exp(g_t) h_{t-1} + v_t` by channel; inputs have `v [B, T, H, V]` and `g` like it, float32 and at most 0."""

    def scan(self, inputs, memory, *, at):
        flat = lambda y: y.reshape(*y.shape[:2], -1)
        start = None if memory is None else memory.reshape(len(memory), -1)
        h, last = linear_scan(flat(inputs.v), flat(inputs.g), initial_state=start, at=at)
        return h.reshape(inputs.v.shape), last.reshape(len(last), self.num_heads, *self.head_dims)

    def rates(self, inputs):
        return jnp.linalg.norm(inputs.v.astype(jnp.float32), axis=-1), -inputs.g.mean(-1)

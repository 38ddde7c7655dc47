"""What the delta-rule family shares: heads that erase what a key holds before they write under it."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from plait.kernels import Tokens, delta_rule, delta_rule_rows
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.decays import inverse_softplus_step, log_uniform_rate
from plait.models.layers.linear import Dense
from plait.models.layers.short_conv import ShortConv
from plait.models.looks.look import GateValues
from plait.models.mixers.linear.recurrent import Recurrent, RecurrentState


class DeltaInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K]
    v: jax.Array  # [B, T, Hv, V]
    g: jax.Array | None  # [B, T, Hv] or [B, T, Hv, K] float32, at most 0; None for no decay
    beta: jax.Array  # [B, T, Hv] float32


class Delta(Recurrent):
    """Convolved queries, keys and values, the first two of unit norm, and strengths of writes. Heads of the contract are the value heads.

    Subclasses set `num_heads`, `head_dims` and `num_qk_heads`, and call `streams_in`, `write_gate` or `head_gates`, and `gated_output`
    in their `__init__`.
    """

    recur = staticmethod(delta_rule)
    recur_rows = staticmethod(delta_rule_rows)
    recur_options = MappingProxyType({"l2_norm_eps": 1e-6})
    num_qk_heads: int
    largest_write: float = 1.0
    """What a write strength stays below: 2 lets the state flip signs (arXiv 2411.12537)."""

    def streams_in(self, ctx: BuildContext, d_model: int, *, conv_size: int | None, writes: int = 1) -> None:
        """Makes the projections of q, k and v and their convolutions (None for none), for `writes` keys and values a token."""
        heads = {"q": self.num_qk_heads, "k": self.num_qk_heads * writes, "v": self.num_heads * writes}
        widths = {name: number * self.head_dims[name == "v"] for name, number in heads.items()}
        self.q, self.k, self.v = (
            Dense(ctx, d_model, widths[name], (EMBED, HEADS), heads=(1, number)) for name, number in heads.items()
        )
        self.convs = () if conv_size is None else ("q_conv", "k_conv", "v_conv")
        if conv_size is not None:
            self.q_conv, self.k_conv, self.v_conv = (
                ShortConv(ctx, width, size=conv_size, axis=HEADS) for width in widths.values()
            )

    def write_gate(self, ctx: BuildContext, d_model: int, *, negative_eigenvalues: bool, writes: int = 1) -> None:
        """Makes the projection to write strengths, below 1, or below 2 with `negative_eigenvalues`."""
        self.largest_write = 2.0 if negative_eigenvalues else 1.0
        self.b = Dense(ctx, d_model, self.num_heads * writes, (EMBED, HEADS), role="gate")

    def head_gates(self, ctx: BuildContext, d_model: int, *, negative_eigenvalues: bool, writes: int = 1) -> None:
        """Makes a decay for each head, Mamba-2's with A uniform up to 16 but away from 0, whose logarithm is none; and `write_gate`."""
        self.a = Dense(ctx, d_model, self.num_heads, (EMBED, HEADS), role="gate")
        self.write_gate(ctx, d_model, negative_eigenvalues=negative_eigenvalues, writes=writes)
        self.A_log = ctx.param(log_uniform_rate(1e-2, 16.0), (self.num_heads,), (HEADS,), role="decay")
        self.dt_bias = ctx.param(inverse_softplus_step(), (self.num_heads,), (HEADS,), role="decay")

    def streams(self, x: jax.Array, *, at: Tokens, state: RecurrentState | None) -> tuple[list[jax.Array], RecurrentState | None]:
        """q, k and v `[B, T, C]` after convolution and silu."""
        projected = {"q_conv": self.q(x), "k_conv": self.k(x), "v_conv": self.v(x)}
        if not self.convs:
            return [jax.nn.silu(y) for y in projected.values()], state
        return self.convolve(projected, at=at, state=state)

    def qk_heads(self, y: jax.Array) -> jax.Array:
        """Query or key heads `[B, T, H, K]`; the op gives them norm 1, and scales q by K^-1/2 after it."""
        return self.heads(y, self.num_qk_heads)

    def write_strength(self, x: jax.Array) -> jax.Array:
        """`beta`, float32 `[B, T, Hv]`."""
        return self.largest_write * jax.nn.sigmoid(self.b(x).astype(jnp.float32))

    def gates_told(self, inputs, x):
        return {**super().gates_told(inputs, x), "write": GateValues(inputs.beta, self.largest_write)}

    def log_decay(self, x: jax.Array) -> jax.Array:
        """`-exp(A_log) softplus(W_a x + dt_bias)`, float32 `[B, T, Hv]`."""
        rate, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.A_log, self.dt_bias))
        return -jnp.exp(rate) * jax.nn.softplus(self.a(x).astype(jnp.float32) + bias)

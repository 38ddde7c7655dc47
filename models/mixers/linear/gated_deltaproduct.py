"""Gated DeltaProduct: several steps of the delta rule a token."""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Whole
from plait.kernels import Tokens
from plait.models.build import BuildContext
from plait.models.mixers.base import register
from plait.models.mixers.linear.delta import Delta
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig


@register(
    "gated_deltaproduct",
    kind="linear",
    source="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (2502.10297)",
    proof="fla: GatedDeltaProduct on naive_recurrent_gated_delta_product",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig):
    """`S <- a_t S_{t-1}`, then n times `S <- S + b_ti k_ti (v_ti - S^T k_ti)^T` with the token's i-th key, value and strength; then
    `S_t = S`, `o_t = S_t^T q_t / sqrt(K)`.

    A token moves the state by a product of n Householder matrices. All else is Gated DeltaNet's, strengths up to 2 by default.
    """

    opaque = "a token writes several values under several keys, and no one weight belongs to it"

    num_householder: Annotated[int, Whole(1, 64)] = 2
    """Steps of the delta rule a token."""
    decay: bool = True
    """Whether the state decays before the first of them; without it this is DeltaProduct."""
    negative_eigenvalues: bool = True
    """Writes with b in (0, 2) in place of (0, 1), without which no step is a reflection (arXiv 2411.12537)."""

    def build(self, d_model: int, ctx: BuildContext) -> GatedDeltaProduct:  # type: ignore[override]
        return GatedDeltaProduct(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        num_heads, num_v_heads = self.heads(d_model)
        n, keys, values = self.num_householder, num_heads * self.head_dim, num_v_heads * self.head_v_dim
        convolved = (1 + n) * keys + n * values
        return 6.0 * n * values * self.head_dim + 2.0 * (self.conv_size or 0) * convolved


class ProductInputs(NamedTuple):
    q: jax.Array  # [B, T, H, K], unit norm
    k: jax.Array  # [B, T, H, n, K], unit norm
    v: jax.Array  # [B, T, Hv, n * V]
    g: jax.Array | None  # [B, T, Hv] float32, at most 0
    beta: jax.Array  # [B, T, Hv, n] float32


class GatedDeltaProduct(Delta):
    """See `GatedDeltaProductConfig`. The op takes each token as n."""

    def __init__(self, config: GatedDeltaProductConfig, d_model: int, ctx: BuildContext):
        self.config, self.steps = config, config.num_householder
        self.num_qk_heads, self.num_heads = config.heads(d_model)
        self.head_dims = config.head_dim, config.head_v_dim
        self.streams_in(ctx, d_model, conv_size=config.conv_size, writes=self.steps)
        make_gates = self.head_gates if config.decay else self.write_gate
        make_gates(ctx, d_model, negative_eigenvalues=config.negative_eigenvalues, writes=self.steps)
        self.gated_output(ctx, d_model, norm_eps=config.norm_eps, gate="silu" if config.gate else None)

    def project(self, x, *, at, state):
        (q, k, v), state = self.streams(x, at=at, state=state)
        k = self.qk_heads(k)
        k = k.reshape(*k.shape[:3], self.steps, -1)
        g = self.log_decay(x) if self.config.decay else None
        beta = self.write_strength(x).reshape(*x.shape[:2], self.num_heads, self.steps)
        return ProductInputs(self.qk_heads(q), k, self.heads(v), g, beta), state

    def _arrays(self, inputs):
        """q, k, v, g and beta of n steps a token: the state decays before the first and is read after the last."""
        q, k, v, g, beta = inputs
        n = self.steps
        only = lambda y, step: jnp.pad(y[:, :, :, None], [(0, 0)] * 3 + [(step, n - 1 - step)] + [(0, 0)] * (y.ndim - 3))
        v = v.reshape(*v.shape[:3], n, -1)
        g = None if g is None else only(g, 0)

        def in_steps(y: jax.Array | None) -> jax.Array | None:  # [B, T, H, n, ...] to [B, T n, H, ...]
            return None if y is None else jnp.moveaxis(y, 3, 2).reshape(y.shape[0], -1, y.shape[2], *y.shape[4:])

        return tuple(map(in_steps, (only(q, n - 1), k, v, g, beta)))

    def _steps(self, at: Tokens) -> Tokens:
        return Tokens(segment_ids=None if at.segment_ids is None else jnp.repeat(at.segment_ids, self.steps, axis=1))

    def attend(self, inputs, *, at, state):
        o, state = super().attend(inputs, at=self._steps(at), state=state)
        return o[:, self.steps - 1 :: self.steps], state

    def implied(self, inputs, rows, *, at):
        return None

    def observe(self, inputs, x, *, at):
        """Of the steps, a token's horizon being n times shorter."""
        found = super().observe(inputs, x, at=self._steps(at))
        stats = found["recurrence"]
        return {**found, "recurrence": stats._replace(decay_horizon=stats.decay_horizon / self.steps)}

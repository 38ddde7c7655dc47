"""The token before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens, short_conv
from plait.models.axes import BATCH, constrain
from plait.models.build import BuildContext


class TokenShift(nnx.Module):
    """`y_t = x_{t-1}` within the segment, and zero at its first token."""

    def __init__(self, ctx: BuildContext, dim: int):
        self.dim, self.dtype = dim, ctx.compute_dtype

    def __call__(self, x: jax.Array, *, at: Tokens, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, D]` to `y [B, T, D]` and the last input `[B, 1, D]`, from which `state` goes on."""
        taps = jnp.broadcast_to(jnp.asarray([[1.0], [0.0]], x.dtype), (2, self.dim))
        return short_conv(x, taps, activation=None, initial_state=state, at=at)

    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros: the start of a document."""
        return constrain(jnp.zeros((batch_size, 1, self.dim), self.dtype), (BATCH, None, None))

"""Short causal convolution over time, one filter a channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import Tokens, short_conv
from plait.models.axes import BATCH, constrain
from plait.models.build import BuildContext


class ShortConv(nnx.Module):
    """`y_t = silu(sum_w weight_w * x_{t-w})` within the segment, depthwise."""

    def __init__(self, ctx: BuildContext, dim: int, *, size: int, axis: str | None):
        """Args: `dim` channels of logical axis `axis`; `size` taps, the last one on the current token."""
        self.size, self.dim, self.axis, self.dtype = size, dim, axis, ctx.compute_dtype
        bound = size**-0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        self.weight = ctx.param(init, (size, dim), (None, axis))

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`x [B, T, D]` to `y [B, T, D]` and the last `size - 1` inputs `[B, size - 1, D]`, from which `state` goes on."""
        return short_conv(
            x, self.weight[...].astype(x.dtype), activation="silu", initial_state=state, at=Tokens(None, segment_ids)
        )

    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros: the start of a document."""
        return constrain(jnp.zeros((batch_size, self.size - 1, self.dim), self.dtype), (BATCH, None, self.axis))

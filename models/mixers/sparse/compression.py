"""A run of tokens as one: the mean, or a learned network of the tokens and their places in the run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels.shapes import accumulation_dtype
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense

_PLACE_INIT = jax.nn.initializers.normal(0.02)


class Compression(nnx.Module):
    """`W_2 silu(W_1 [x_1 + e_1, ..., x_l + e_l] + b)`, one for all heads, e learned; NSA (2502.11089), equation 7.

    The paper asks for a network with the places in the run and says no more of it.
    """

    def __init__(self, ctx: BuildContext, span: int, channels: int, hidden_dim: int):
        self.places = ctx.param(_PLACE_INIT, (span, channels), (None, None))
        self.hidden = Dense(ctx, span * channels, hidden_dim, (None, None), use_bias=True)
        self.out = Dense(ctx, hidden_dim, channels, (None, None))

    def __call__(self, tokens: jax.Array, real: jax.Array) -> jax.Array:
        """`[B, N, H, K]` of tokens `[B, N, C, H, K]`; those that are not `real` `[B, N, C]` count as zeros."""
        x = tokens + self.places[...].astype(tokens.dtype)[None, None, :, None]
        x = jnp.moveaxis(jnp.where(real[..., None, None], x, 0), 3, 2)
        return self.out(jax.nn.silu(self.hidden(x.reshape(*x.shape[:3], -1))))


def mean(tokens: jax.Array, real: jax.Array) -> jax.Array:
    """The mean `[B, N, H, K]` over the real tokens, in their dtype."""
    total = jnp.where(real[..., None, None], tokens.astype(accumulation_dtype(tokens)), 0).sum(2)
    return (total / jnp.maximum(real.sum(2), 1).astype(total.dtype)[..., None, None]).astype(tokens.dtype)

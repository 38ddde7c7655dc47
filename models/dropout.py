"""Dropout: what training leaves out at random, of features or of heads."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import Config
from plait.configs.domains import Heads, Number
from plait.kernels import Tokens
from plait.models.build import Buffer, BuildContext

_PLACES = 3
"""Draws of a layer: one a half, and one of heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig(Config):
    """What training steps leave out at random; scoring, probes of a trained model and decoding leave out nothing.

    What is left out follows from the config's `seed`, the step and where a token stands, so that a run that goes on, or is cut over devices
    otherwise, leaves out the same.
    """

    path = "model.dropout"

    rate: Annotated[float, Number(least=0, most=0.99)] = 0.0
    """Share of the features of the embedding, and of what each half of a block adds to the stream, that become 0; the others are multiplied
    by 1 / (1 - rate) (Srivastava et al., JMLR 15, 2014; embedding and residual dropout of GPT-2). Weights of attention have none."""
    heads: Heads | None = None
    """Heads of a layer whose outputs become 0, others in each row and layer (HeadMask, random, 2009.09672); nothing makes up for them. Layers
    that have no more heads, or whose heads have no output of their own, are left alone."""

    @property
    def asked(self) -> bool:
        """Whether there is any."""
        return self.rate > 0 or self.heads is not None


class Dropout(nnx.Module):
    """That of one layer; of the embedding it is the one after the last."""

    def __init__(self, config: DropoutConfig, ctx: BuildContext):
        self.config = config
        self.layer = Buffer(jnp.asarray(ctx.layer_index, jnp.int32), axes=())

    def __call__(self, x: jax.Array, at: Tokens, half: int = 0) -> jax.Array:
        """`x` `[B, T, D]` without some of its features, where a training step has given tokens their noise."""
        if at.noise is None or not self.config.rate:
            return x
        draw = lambda key: jax.random.bernoulli(key, 1 - self.config.rate, x.shape[-1:])
        kept = jax.vmap(jax.vmap(draw))(self._keys(at.noise, half))
        return jnp.where(kept, x / (1 - self.config.rate), 0).astype(x.dtype)

    def kept_heads(self, num_heads: int, at: Tokens) -> jax.Array | None:
        """Which heads a training step keeps in each row, bool `[B, H]`; None where all are."""
        left_out = self.config.heads
        if at.noise is None or left_out is None or left_out >= num_heads:
            return None
        drawn = jax.vmap(lambda key: jax.random.permutation(key, num_heads))(self._keys(at.noise[:, 0], 2))
        return drawn >= left_out

    def _keys(self, noise: jax.Array, place: int) -> jax.Array:
        """A key for each entry of `noise`."""
        own = (self.layer[...] * _PLACES + place).astype(jnp.uint32)
        return jax.random.wrap_key_data(jnp.stack([noise, jnp.broadcast_to(own, noise.shape)], -1), impl="threefry2x32")

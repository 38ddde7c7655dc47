"""Inputs of each layer's own: embeddings of the token for every layer, which its block lets into the stream."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import Config
from plait.configs.domains import Width
from plait.kernels import Tokens
from plait.models.axes import BATCH, EMBED, LENGTH, VOCAB, constrain
from plait.models.build import Buffer, BuildContext, Initializer
from plait.models.channel_mixers.gated_mlp import ACTIVATIONS, Activation
from plait.models.layers.linear import Dense
from plait.models.layers.norms import make_norm
from plait.models.stream import Carry

if TYPE_CHECKING:
    from plait.models.config import LMConfig

LAYER_INPUTS = "layer_inputs"
"""Name in the carry: `[B, T, layers, dim]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputsConfig(Config):
    """At its end block l adds `norm(W_out (act(W_gate x) * e_l))` to the stream x, as in Gemma 3n and the small models of Gemma 4.

    `e_l = (sqrt(dim) E_l[token] + norm(W_l h / sqrt(d_model))) / sqrt(2)`, h being the model's embedding of the token. The tables E_l are
    large and cost a look-up; they need not lie where the model is computed.
    """

    path = "layer_inputs"

    dim: Width | None = None
    """Channels of a layer's input; None leaves these out."""
    activation: Activation = "gelu"
    """Of the gates."""

    def flops(self, d_model: int, num_layers: int) -> float:
        """Forward operations per token, 2 per multiply-add."""
        return 6.0 * d_model * num_layers * (self.dim or 0)


class LayerInputs(nnx.Module):
    """The inputs of all layers; see `LayerInputsConfig`."""

    def __init__(self, config: LayerInputsConfig, model: LMConfig, ctx: BuildContext, start: Initializer):
        """Args: `start` of the tables."""
        assert config.dim is not None and model.vocab_size is not None
        self.dim, self.num_layers, self.d_model = config.dim, model.num_layers, model.d_model
        width = config.dim * model.num_layers
        self.embedding = ctx.param(start, (model.vocab_size, width), (VOCAB, EMBED), role="embedding")
        self.projection = Dense(ctx, model.d_model, width, (EMBED, None), heads=(1, model.num_layers))
        self.norm = make_norm(ctx, config.dim, eps=model.norm_eps)

    def __call__(self, x: jax.Array, at: Tokens) -> jax.Array:
        """`[B, T, layers, dim]` of the embedded tokens `x` `[B, T, D]`."""
        each = (*x.shape[:2], self.num_layers, self.dim)
        tokens = self.embedding[...].astype(x.dtype)[at.ids].reshape(each) * jnp.asarray(self.dim**0.5, x.dtype)
        projected = self.projection(x) * jnp.asarray(self.d_model**-0.5, x.dtype)
        both = (self.norm(projected.reshape(each)) + tokens) * jnp.asarray(2**-0.5, x.dtype)
        return constrain(both, (BATCH, LENGTH, None, None))


class LayerGate(nnx.Module):
    """What lets a layer's input into the stream; see `LayerInputsConfig`."""

    def __init__(self, config: LayerInputsConfig, d_model: int, ctx: BuildContext, *, eps: float):
        assert config.dim is not None
        self.activation = ACTIVATIONS[config.activation]
        self.index = Buffer(jnp.asarray(ctx.layer_index, jnp.int32), axes=())
        self.gate = Dense(ctx, d_model, config.dim, (EMBED, None), role="gate")
        self.out = Dense(ctx, config.dim, d_model, (None, EMBED), init=ctx.residual_init)
        self.norm = make_norm(ctx, d_model, eps=eps)

    def __call__(self, x: jax.Array, carry: Carry) -> jax.Array:
        """The stream `[B, T, D]` with this layer's part of the carry."""
        own = jax.lax.dynamic_index_in_dim(carry[LAYER_INPUTS], self.index[...], axis=2, keepdims=False)
        return x + self.norm(self.out(self.activation(self.gate(x)) * own))

"""Channel mixers: the half of a block that acts on each token alone."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from flax import nnx

from plait.models.axes import EMBED, MLP
from plait.models.build import BuildContext
from plait.models.linear import Dense

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedMLPConfig:
    """Gated channel mixer `W_down(act(W_gate x) * W_up x)` (arXiv 2002.05202)."""

    hidden_dim: int | None = None
    """Inner width; None gives 8/3 of d_model rounded up to a multiple of 64 (4 d_model's parameters over three matrices)."""
    activation: Literal["silu", "gelu", "relu"] = "silu"

    def __post_init__(self) -> None:
        if self.hidden_dim is not None and self.hidden_dim <= 0:
            raise ValueError(
                f"model.channel_mixer.hidden_dim={self.hidden_dim} must be positive; leave it None to derive it from d_model"
            )

    def width(self, d_model: int) -> int:
        """Inner width for `d_model`."""
        return self.hidden_dim or -(-8 * d_model // 3 // 64) * 64

    def build(self, d_model: int, ctx: BuildContext) -> GatedMLP:
        """The module of this config."""
        return GatedMLP(self, d_model, ctx)


class GatedMLP(nnx.Module):
    """See `GatedMLPConfig`."""

    def __init__(self, config: GatedMLPConfig, d_model: int, ctx: BuildContext):
        self.activation = _ACTIVATIONS[config.activation]
        width = config.width(d_model)
        self.gate = Dense(ctx, d_model, width, (EMBED, MLP))
        self.up = Dense(ctx, d_model, width, (EMBED, MLP))
        self.down = Dense(ctx, width, d_model, (MLP, EMBED), init=ctx.residual_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]`."""
        return self.down(self.activation(self.gate(x)) * self.up(x))

"""What a layer needs to build itself besides its own config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import Axes

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
SigmaReparam = Literal["spectral", "one"]


def fan_in_normal(gain: float = 1.0) -> Initializer:
    """Truncated normal of standard deviation `gain / sqrt(fan_in)`, fan-in being the first axis."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        std = gain / shape[0] ** 0.5 / 0.87962566  # the standard deviation of a unit normal cut at two sigmas
        return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


class Buffer(nnx.Variable):
    """Non-trained state of a layer: sharded and checkpointed like a parameter, never seen by the optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """The surroundings of one layer: where it stands, its random stream, and the numerics every layer of the model shares."""

    layer_index: int
    num_layers: int
    rngs: nnx.Rngs
    seq_len: int
    """Training sequence length in tokens (layers accept any length; some options scale with this one)."""
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    sigma_reparam: SigmaReparam | None = None

    def param(self, init: Initializer, shape: tuple[int, ...], axes: Axes, *, decay: bool = False) -> nnx.Param:
        """A trained parameter of logical `axes`; `decay`: weight decay applies (to matrices, not to gains, biases and decays)."""
        return nnx.Param(init(self.rngs.params(), shape, self.param_dtype), axes=axes, decay=decay)

    @property
    def residual_init(self) -> Initializer:
        """Initialiser of projections that write to the residual stream: shrunk with depth so that its variance stays bounded."""
        return fan_in_normal((2 * self.num_layers) ** -0.5)

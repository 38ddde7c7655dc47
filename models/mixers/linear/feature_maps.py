"""Feature maps of queries and keys, whose products stand for exponentials of products; computed in float32."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from plait.models.axes import HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import GroupNorm

MapName = Literal["elu", "identity", "relu", "dpfp", "rebased", "hadamard"]
SIGNED: tuple[MapName, ...] = ("identity", "hadamard")
"""Maps under which weights may be negative, so that sums of them may vanish."""
DPFP_ROLLS = 4


def elu(x: jax.Array) -> jax.Array:
    """`elu(x) + 1`, above 0 (arXiv 2006.16236)."""
    return jax.nn.elu(x) + 1


def dpfp(x: jax.Array) -> jax.Array:
    """Products of `[relu(x), relu(-x)]` with itself rolled by 1 to 4, `[..., 8 K]` (arXiv 2102.11174)."""
    both = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([both * jnp.roll(both, shift, axis=-1) for shift in range(1, DPFP_ROLLS + 1)], axis=-1)


def pairs(x: jax.Array, *, symmetric: bool = True) -> jax.Array:
    """Features whose products are `(q . k)^2`: all `x_i x_j`, or those with i <= j, the mixed ones times sqrt 2."""
    dim = x.shape[-1]
    i, j = np.triu_indices(dim) if symmetric else np.indices((dim, dim)).reshape(2, -1)
    weight = np.where(i == j, 1.0, 2**0.5) if symmetric else np.ones(dim * dim)
    return x[..., i] * x[..., j] * jnp.asarray(weight, x.dtype).reshape(*[1] * (x.ndim - 1), -1)


def num_pairs(dim: int, *, symmetric: bool = True) -> int:
    """How many features `pairs` gives."""
    return dim * (dim + 1) // 2 if symmetric else dim * dim


def taylor(x: jax.Array, *, symmetric: bool = True) -> jax.Array:
    """Features whose products are `1 + s + s^2 / 2`, `s = q . k / sqrt(K)`: exp to second order (arXiv 2402.18668)."""
    root = x.shape[-1] ** 0.5
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x / root**0.5, pairs(x, symmetric=symmetric) / (2**0.5 * root)], axis=-1)


def per_head(dense: Dense, x: jax.Array) -> jax.Array:
    """`x_h W_h (+ b_h)` of `x` `[B, T, H, I]` in its dtype, for a `Dense` with a matrix a head."""
    y = jnp.einsum("bthi,hio->btho", x, dense.weight().astype(x.dtype))
    return y if dense.bias is None else y + dense.bias[...].astype(x.dtype)[None, None]


class FeatureMap(nnx.Module):
    """A feature map by its name, with its own weights for each head where it has some."""

    def __init__(self, ctx: BuildContext, name: MapName, num_heads: int, dim: int):
        """Args: `dim` channels a head."""

        def matrices(use_bias: bool) -> Dense:
            return Dense(ctx, dim, dim, (HEADS, None, None), lead=(num_heads,), use_bias=use_bias)

        self.name, self.dim = name, dim
        self.first = matrices(name == "hadamard") if name in ("relu", "hadamard") else None
        self.second = matrices(True) if name == "hadamard" else None
        self.norm = GroupNorm(ctx, dim, groups=1, eps=1e-5) if name == "rebased" else None

    @staticmethod
    def size(name: MapName, dim: int) -> int:
        """Features of `dim` channels."""
        return {"dpfp": 2 * DPFP_ROLLS * dim, "rebased": num_pairs(dim)}.get(name, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, H, K]` to `[B, T, H, size]` float32."""
        x = x.astype(jnp.float32)
        if self.norm is not None:
            return pairs(self.norm(x)) / self.dim**0.5
        if self.first is not None:
            y = per_head(self.first, x)
            return jax.nn.relu(y) if self.second is None else y * per_head(self.second, x)
        return {"elu": elu, "dpfp": dpfp}.get(self.name, lambda x: x)(x)


def identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An initial value: the identity of each head."""
    return jnp.broadcast_to(jnp.eye(shape[-2], shape[-1], dtype=dtype), shape)


class SoftmaxMap(nnx.Module):
    """Positive features `[B, T, H, 2 F]` float32 of `[B, T, H, K]`: softmaxes over channels of a projection of each head's own and its
    negative (arXiv 2402.04347)."""

    def __init__(
        self,
        ctx: BuildContext,
        num_heads: int,
        dim: int,
        features: int | None = None,
        *,
        joint: bool = False,
        init: Any = identity,
    ):
        """Args: `features` is F, `dim` by default; `joint`: one softmax over both, of 2 W x + 2 b and its negative."""
        self.joint = joint
        self.w = Dense(ctx, dim, features or dim, (HEADS, None, None), lead=(num_heads,), init=init, use_bias=joint)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = per_head(self.w, x.astype(jnp.float32))
        if self.joint:
            return jax.nn.softmax(jnp.concatenate([2 * y, -2 * y], axis=-1), axis=-1)
        return jnp.maximum(jnp.concatenate([jax.nn.softmax(y, axis=-1), jax.nn.softmax(-y, axis=-1)], axis=-1), 1e-12)

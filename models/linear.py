"""The one linear projection of every layer, with sigmaReparam as an option of the whole model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.axes import Axes
from plait.models.build import Buffer, BuildContext, Initializer, Role, fan_in_normal

_INITIAL_POWER_STEPS = 64


class SpectralVector(Buffer):
    """Unit estimate of a leading singular vector, moved by one power step per optimizer step."""


def power_step(kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One power iteration of `kernel` `[..., I, O]` from the right vector `u` `[..., O]`: unit `v` `[..., I]` and `u`, float32.

    Source: sigmaReparam (arXiv 2303.06296), section 3. Leading axes are independent matrices (stacked layers).
    """
    kernel = kernel.astype(jnp.float32)
    v = _unit(jnp.einsum("...io,...o->...i", kernel, u, precision="highest"))
    return v, _unit(jnp.einsum("...io,...i->...o", kernel, v, precision="highest"))


@jax.jit
def _leading_vectors(kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vectors after the power steps of a new layer."""
    return jax.lax.fori_loop(0, _INITIAL_POWER_STEPS, lambda _, vu: power_step(kernel, vu[1]), power_step(kernel, u))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _sigma(kernel: jax.Array, v: jax.Array, u: jax.Array) -> jax.Array:
    return jnp.einsum("...i,...io,...o->...", v, kernel.astype(jnp.float32), u, precision="highest")


class Dense(nnx.Module):
    """`y = x @ W (+ b)`, with `W = (gain / sigma(kernel)) kernel` under sigmaReparam.

    The forward pass only reads the singular vectors (gradient flows through `kernel` alone); `power_iterate` moves them, once per
    optimizer step. `sigma_reparam="spectral"` starts `gain` at sigma(kernel), as a plain projection would; `"one"` at 1.
    """

    def __init__(
        self,
        ctx: BuildContext,
        in_dim: int,
        out_dim: int,
        axes: Axes,
        *,
        init: Initializer | None = None,
        use_bias: bool = False,
        role: Role = "matrix",
        heads: tuple[int, int] | None = None,
        lead: tuple[int, ...] = (),
    ):
        """Args:
        axes: logical names of the kernel's axes.
        init: a fan-in truncated normal by default.
        role: what the kernel is to the optimizer.
        heads: `(axis, number)` where one of the last two axes holds that many heads.
        lead: sizes of leading axes, along which lie independent matrices (experts), each with its own singular vectors and gain.
        """
        self.compute_dtype = ctx.compute_dtype
        split = None if heads is None else (heads[0] - 2, ((in_dim, out_dim)[heads[0]] // heads[1],) * heads[1])
        self.kernel = ctx.param(init or fan_in_normal(), (*lead, in_dim, out_dim), axes, role=role, split=split)
        self.bias = ctx.param(jax.nn.initializers.zeros, (*lead, out_dim), (*axes[:-2], axes[-1])) if use_bias else None
        self.gain = self.v = self.u = nnx.data(None)
        if ctx.sigma_reparam is not None:
            kernel = self.kernel[...]
            u = _unit(jax.random.normal(ctx.rngs.params(), (*lead, out_dim), jnp.float32))
            v, u = _leading_vectors(kernel, u)
            gain = _sigma(kernel, v, u) if ctx.sigma_reparam == "spectral" else jnp.ones(lead, jnp.float32)
            self.gain = nnx.Param(gain.astype(ctx.param_dtype), axes=axes[:-2], role="vector", split=None)
            self.v = SpectralVector(v, axes=axes[:-1])
            self.u = SpectralVector(u, axes=(*axes[:-2], axes[-1]))

    def weight(self) -> jax.Array:
        """The matrix that multiplies, `[..., in_dim, out_dim]` in the parameter dtype, leading axes for stacked layers."""
        kernel = self.kernel[...]
        if self.gain is None or self.v is None or self.u is None:
            return kernel
        scale = self.gain[...] / _sigma(kernel, self.v[...], self.u[...])
        return kernel * scale[..., None, None].astype(kernel.dtype)

    def power_iterate(self) -> None:
        """Move the singular vectors one power step towards the kernel's leading ones. Nothing to do without sigmaReparam."""
        if self.v is not None and self.u is not None:
            v, u = power_step(jax.lax.stop_gradient(self.kernel[...]), self.u[...])
            self.v[...], self.u[...] = v, u

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_dim] -> [..., out_dim]` in the compute dtype."""
        y = x.astype(self.compute_dtype) @ self.weight().astype(self.compute_dtype)
        if self.bias is not None:
            bias = self.bias[...].astype(self.compute_dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y


def dense_layers(model: nnx.Module) -> list[tuple[tuple, Dense]]:
    """Every `Dense` of `model` with its path, in a stable order."""
    return [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Dense)]


def power_iterate(model: nnx.Module) -> None:
    """One power step for every projection of `model`, in place."""
    for _, layer in dense_layers(model):
        layer.power_iterate()

"""The one linear projection of every layer, with sigmaReparam and low-rank adapters as options of the whole model."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels.sharding import undivided
from plait.kernels.target import on_cpu
from plait.models.axes import Axes
from plait.models.build import Adapter, Buffer, BuildContext, Initializer, Role, SigmaReparam, fan_in_normal

_EXACT: dict = {"precision": "highest"}
_KRYLOV_STEPS = 96
_SQUARINGS = 16


class SpectralVector(Buffer):
    """Unit estimate of a leading singular vector, moved by one power step per optimizer step."""


def power_step(kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One power iteration of `kernel` `[..., I, O]` from the right vector `u` `[..., O]`: unit `v` `[..., I]` and `u`, float32.

    Source: sigmaReparam (arXiv 2303.06296), section 3. Leading axes are independent matrices (stacked layers).
    """
    kernel = kernel.astype(jnp.float32)
    v = _unit(jnp.einsum("...io,...o->...i", kernel, u, **_EXACT))
    return v, _unit(jnp.einsum("...io,...i->...o", kernel, v, **_EXACT))


@jax.jit
def leading_vectors(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading singular vectors of `kernel` `[..., I, O]`: unit `v` `[..., I]` and `u` `[..., O]`, float32.

    Exact up to rounding where the smaller side is at most 96, and in practice beyond: those of `kernel` within the Krylov space that 96
    steps of Golub-Kahan-Lanczos (SIAM J. Numer. Anal. 2(2), 1965), orthogonalised anew at each, span.
    Plain power steps would need as many as the gap between the two largest singular values is small.
    """
    largest = jnp.abs(kernel).max((-2, -1), keepdims=True)
    kernel = kernel.astype(jnp.float32) / jnp.where(largest > 0, largest, 1).astype(jnp.float32)
    size = min(*kernel.shape[-2:], _KRYLOV_STEPS)

    def grow(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        basis, u = carry
        u = jnp.einsum("...io,...i->...o", kernel, jnp.einsum("...io,...o->...i", kernel, u, **_EXACT), **_EXACT)
        for _ in range(2):  # once more for what rounding left
            u = u - jnp.einsum("...mo,...m->...o", basis, jnp.einsum("...mo,...o->...m", basis, u, **_EXACT), **_EXACT)
        u = _unit(u)
        return jax.lax.dynamic_update_index_in_dim(basis, u, i, u.ndim - 1), u

    lead, width = kernel.shape[:-2], kernel.shape[-1]
    start = jnp.broadcast_to(jnp.cos(jnp.arange(width, dtype=jnp.float32) ** 2), (*lead, width))  # like no kernel
    basis, _ = jax.lax.fori_loop(0, size, grow, (jnp.zeros((*lead, size, width), jnp.float32), start))
    seen = jnp.einsum("...io,...mo->...im", kernel, basis, **_EXACT)
    gram = jnp.einsum("...im,...in->...mn", seen, seen, **_EXACT)

    def square(_: int, power: jax.Array) -> jax.Array:
        power = power / jnp.maximum(jnp.abs(power).max((-2, -1), keepdims=True), 1e-30)
        return jnp.einsum("...mn,...nk->...mk", power, power, **_EXACT)

    power = jax.lax.fori_loop(0, _SQUARINGS, square, gram)  # the leading eigenvector times itself
    best = jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1)
    y = _unit(jnp.take_along_axis(power, best[..., None, None], axis=-2)[..., 0, :])
    u = _unit(jnp.einsum("...mo,...m->...o", basis, y, **_EXACT))
    return power_step(kernel, u)


def spectral_norm(kernel: jax.Array) -> jax.Array:
    """The largest singular value of `kernel` `[..., I, O]`, float32, as exact as `leading_vectors`."""
    _, u = leading_vectors(kernel)
    return jnp.linalg.norm(jnp.einsum("...io,...o->...i", kernel.astype(jnp.float32), u, **_EXACT), axis=-1)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Between -1 and 1 over the root of the last axis but one. Source: LoRA (arXiv 2106.09685), the authors' code."""
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) / shape[-2] ** 0.5


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _sigma(kernel: jax.Array, v: jax.Array, u: jax.Array) -> jax.Array:
    return jnp.einsum("...i,...io,...o->...", v, kernel.astype(jnp.float32), u, **_EXACT)


class Dense(nnx.Module):
    """`y = x @ W (+ b)`, with `W = (gain / sigma(kernel)) kernel` under sigmaReparam, and `y = x @ W + s (x @ A) @ B (+ b)` with an adapter.

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
        self.lora_a = self.lora_b = nnx.data(None)
        if ctx.lora is not None and role in ctx.lora.roles:
            self.lora_scale, rank = ctx.lora.scale, ctx.lora.rank or 1
            a = _uniform(ctx.rngs.params(), (*lead, in_dim, rank))
            self.lora_a = Adapter(a, axes=(*axes[:-1], None), role="matrix", split=None)
            b = jnp.zeros((*lead, rank, out_dim), jnp.float32)
            self.lora_b = Adapter(b, axes=(*axes[:-2], None, axes[-1]), role="matrix", split=None)
        self.gain = self.v = self.u = nnx.data(None)
        if ctx.sigma_reparam is not None:
            self.gain = nnx.Param(jnp.ones(lead, ctx.param_dtype), axes=axes[:-2], role="vector", split=None)
            self.v = SpectralVector(jnp.zeros((*lead, in_dim), jnp.float32), axes=axes[:-1])
            self.u = SpectralVector(jnp.zeros((*lead, out_dim), jnp.float32), axes=(*axes[:-2], axes[-1]))
            if not ctx.defer_vectors:
                self.start_from(leading_vectors(self.kernel[...]), ctx.sigma_reparam)

    def start_from(self, vectors: tuple[jax.Array, jax.Array], sigma_reparam: SigmaReparam) -> None:
        """Takes the leading singular vectors of a new kernel, and the gain that goes with them."""
        if self.gain is None or self.v is None or self.u is None:
            return
        self.v[...], self.u[...] = vectors
        if sigma_reparam == "spectral":
            self.gain[...] = _sigma(self.kernel[...], *vectors).astype(self.gain.dtype)

    def weight(self) -> jax.Array:
        """The matrix that multiplies, `[..., in_dim, out_dim]` in the parameter dtype, leading axes for stacked layers."""
        weight = self._without_adapter()
        if self.lora_a is None or self.lora_b is None:
            return weight
        change = jnp.matmul(self.lora_a[...], self.lora_b[...], **_EXACT)
        return (weight.astype(jnp.float32) + self.lora_scale * change).astype(weight.dtype)

    def _without_adapter(self) -> jax.Array:
        kernel = self.kernel[...]
        if self.gain is None or self.v is None or self.u is None:
            return kernel
        scale = self.gain[...].astype(jnp.float32) / _sigma(kernel, self.v[...], self.u[...])
        return (kernel * scale[..., None, None]).astype(kernel.dtype)

    def scale_outputs(self, factors: jax.Array) -> None:
        """Multiplies each output by its factor, `[..., out_dim]` float32, leading axes for stacked layers."""
        for parameter, by in ((self.kernel, factors[..., None, :]), (self.bias, factors)):
            if parameter is not None:
                parameter[...] = (parameter[...].astype(jnp.float32) * by).astype(parameter.dtype)

    def power_iterate(self) -> None:
        """Move the singular vectors one power step towards the kernel's leading ones. Nothing to do without sigmaReparam."""
        if self.v is not None and self.u is not None:
            v, u = power_step(jax.lax.stop_gradient(self.kernel[...]), self.u[...])
            self.v[...], self.u[...] = v, u

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_dim] -> [..., out_dim]` in the compute dtype."""
        lead, x = x.shape[:-1], x.astype(self.compute_dtype)
        if self.kernel.ndim == 2 and on_cpu() and undivided():
            x = x.reshape(-1, x.shape[-1])  # a CPU copies what it multiplies over several axes, as for the kernel's gradients
        y = x @ self._without_adapter().astype(self.compute_dtype)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = (part[...].astype(self.compute_dtype) for part in (self.lora_a, self.lora_b))
            y = y + self.lora_scale * ((x @ a) @ b)
        if self.bias is not None:
            bias = self.bias[...].astype(self.compute_dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y.reshape(*lead, -1)


def dense_layers(model: nnx.Module) -> list[tuple[tuple, Dense]]:
    """Every `Dense` of `model` with its path, in a stable order."""
    return [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Dense)]


def start_singular_vectors(model: nnx.Module, sigma_reparam: SigmaReparam) -> None:
    """Starts every projection of a new model from its kernel's leading singular vectors; those of one shape are found together."""
    by_shape: dict[tuple[int, ...], list[Dense]] = {}
    for _, layer in dense_layers(model):
        if layer.u is not None:
            by_shape.setdefault(layer.kernel.shape[-2:], []).append(layer)
    for layers in by_shape.values():
        kernels = [layer.kernel[...] for layer in layers]
        v, u = leading_vectors(jnp.concatenate([kernel.reshape(-1, *kernel.shape[-2:]) for kernel in kernels]))
        done = 0
        for layer, kernel in zip(layers, kernels, strict=True):
            lead = kernel.shape[:-2]
            count = math.prod(lead)
            layer.start_from(
                (v[done : done + count].reshape(*lead, -1), u[done : done + count].reshape(*lead, -1)), sigma_reparam
            )
            done += count


def power_iterate(model: nnx.Module) -> None:
    """One power step for every projection of `model`, in place."""
    for _, layer in dense_layers(model):
        layer.power_iterate()

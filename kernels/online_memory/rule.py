"""The four choices of a memory that learns while it reads (Miras): its structure, what it minds, what it keeps, how it learns.

Everything is in the dtype of its arguments, which the implementations widen to float32. Arrays have any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from plait.kernels.chunking import dot

Array = jax.Array
Weights = tuple[Array, ...]
"""One matrix `[..., I, O]` a layer."""

_NORM_EPS = 1e-5
_ROUND = 1e-6
_SMALLEST = 1e-6
_STEEP = 10.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a memory is and how it learns; hashable, so that programs are specialised to it.

    How fast it learns and forgets, and whether with momentum, is in the gates of each call.
    """

    residual: bool = False
    """The memory is `x + norm(MLP(x))`, a layer norm without parameters; else the MLP. GELU between layers."""
    bias: Literal["lp", "huber"] = "lp"
    """What it minds in the error e of a key's value: `sum |e|^p`; or the same with p = 2 where `|e|` is at most a threshold, and the
    threshold times `sum |e|` beyond it."""
    p: float = 2.0
    """Exponent of `lp`. But for 2, `|e|` is `sqrt(e^2 + 1e-6)` and the sign `tanh(10 e)`, so that its gradient has one."""
    retention: Literal["l2", "lq", "kl"] = "l2"
    """What the weights W are of what is accumulated, A: A; `A / norm_q(A)^(q - 2)` with the norm at the start of the chunk; or the softmax
    of A over the units between the two layers, A being log W up to a constant."""
    q: float = 4.0
    """Exponent of `lq`."""
    chunk_size: int = 64
    """Tokens whose gradients are taken at one memory, that before the first of them; counted from the start of the document."""

    def apply(self, x: Array, product: Callable[[int, Array], Array], depth: int) -> Array:
        """The memory's answer to x `[..., K]`; `product(l, y)` is y times the matrix of layer l."""
        y = x
        for layer in range(depth):
            y = product(layer, y if layer == 0 else jax.nn.gelu(y, approximate=False))
        return x + _layer_norm(y) if self.residual else y

    def pull(self, error: Array, threshold: Array | None) -> Array:
        """The gradient in the error `[..., V]` of what is minded; `threshold` `[...]` is huber's."""
        if self.bias == "huber":
            near = jnp.linalg.norm(error, axis=-1, keepdims=True) <= threshold[..., None]  # type: ignore[index]
            return jnp.where(near, 2.0 * error, threshold[..., None] * jnp.tanh(_STEEP * error))  # type: ignore[index]
        if self.p == 2:
            return 2.0 * error
        return self.p * jnp.tanh(_STEEP * error) * (jnp.square(error) + _ROUND) ** ((self.p - 1) / 2)

    def scales(self, opened: Weights) -> tuple[Array | float, ...]:
        """Factors of what is accumulated, by layer, from its value `opened` at the start of the chunk."""
        return tuple(_norm(a, self.q) ** (2 - self.q) if self.retention == "lq" else 1.0 for a in opened)

    def weight(self, layer: int, accumulated: Array, scale: Array | float) -> Array:
        """The weights of a layer."""
        if self.retention == "kl":
            return jax.nn.softmax(accumulated, axis=-1 if layer == 0 else -2)
        return accumulated * scale

    def weights(self, accumulated: Weights, opened: Weights) -> Weights:
        """The weights of all layers; `opened` is what was accumulated at the start of the chunk."""
        scales = self.scales(opened)
        return tuple(self.weight(layer, a, scales[layer]) for layer, a in enumerate(accumulated))

    def slopes(self, weights: Weights, k: Array, v: Array, threshold: Array | None) -> tuple[Weights, Weights]:
        """For each layer what it read, h `[..., I]`, and the gradient in what it gave, d `[..., O]`, at keys k and values v: h d^T is
        the gradient in its weights, `[..., I, O]` of the same leading axes but the last."""
        seen: list[Array] = []

        def answer(moves: Weights) -> tuple[Array, Weights]:
            seen.clear()

            def product(layer: int, y: Array) -> Array:
                seen.append(y)
                return dot("...ti,...io->...to", y, weights[layer]) + moves[layer]

            return self.apply(k, product, len(weights)), tuple(seen)

        still = tuple(jnp.zeros((*k.shape[:-1], w.shape[-1]), k.dtype) for w in weights)
        answered, back, read = jax.vjp(answer, still, has_aux=True)
        return read, back(self.pull(answered - v, threshold))[0]


def _norm(a: Array, q: float) -> Array:
    """The q-norm of a matrix, `[..., 1, 1]` and at least 1e-6, of its entries over the largest one."""
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.abs(a).max((-2, -1), keepdims=True), _SMALLEST))
    total = jnp.sum((jnp.abs(a) / largest) ** q, (-2, -1), keepdims=True)
    return largest * jnp.where(total >= 1, total, 1.0) ** (1 / q)


def by_channel(gate: Array, layer: int, depth: int) -> Array:
    """A gate of each channel of keys and values `[..., K or 1]` so that it multiplies a matrix `[..., I, O]` of a layer: along the
    inputs of the first of two layers, along the outputs of the last."""
    return gate[..., :, None] if layer == 0 and depth > 1 else gate[..., None, :]


def _layer_norm(x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _NORM_EPS)

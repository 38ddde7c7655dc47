"""What gradients for a matrix unit of 256 are made of, turned.

Gradients of keys are sums over queries of weights and d_logits, which are kept keys by queries. A product that wants them queries by keys has
the matrix unit turn them, at half its speed; here another unit does, on their way through memory, from where products take them as they lie.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from plait.kernels.attention.tpu.weights import NN, dot

Array = jax.Array


class Turned(NamedTuple):
    """References to memory that a core keeps."""

    q: Any
    """[K, M]"""
    d_o: Any
    """[V, M]"""
    squares: Sequence[Any]
    """[M, N] of the weights and of the d_logits of a rectangle, and of the next."""

    @staticmethod
    def of(widths: tuple[int, int], num_queries: int, rectangle: tuple[int, int], dtype: Any, memory: Any) -> list[Any]:
        """The memory that they take, of rectangles of at most so many queries and keys; `memory(shape, dtype)` names some."""
        return [memory(shape, dtype) for shape in (*((width, num_queries) for width in widths), *[rectangle] * 4)]

    @staticmethod
    def at(memory: Sequence[Any]) -> "Turned | None":
        """What lies there, if anything does."""
        return Turned(memory[0], memory[1], memory[2:]) if memory else None

    def take(self, q: Array, d_o: Array) -> None:
        """Queries [M, K] and d_o [M, V]."""
        self.q[...], self.d_o[...] = q.T, d_o.T

    def put(self, n: int, weights: Array, d_logits: Array) -> None:
        """Those [N, M] of the n-th rectangle."""
        for ref, x in zip(self._squares(n), (weights, d_logits), strict=True):
            ref[: x.shape[1], : x.shape[0]] = x.T

    def of_keys(self, n: int, queries: slice, num_keys: int) -> tuple[Array, Array]:
        """What the n-th rectangle adds to the gradients of so many keys, over the scale [K, N], and of their values [V, N]."""
        weights, d_logits = (ref[: queries.stop - queries.start, :num_keys] for ref in self._squares(n))
        return dot(self.q[:, queries], d_logits, NN), dot(self.d_o[:, queries], weights, NN)

    def _squares(self, n: int) -> Sequence[Any]:
        return self.squares[2 * (n % 2) : 2 * (n % 2) + 2]

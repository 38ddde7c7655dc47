"""Taps: through them an observer sees the gradients that pass a layer, in the backward pass of a probe step itself.

A tap is the identity. In the backward pass it lets the gradient through as it is, and says of some zeros, which the loss does not depend
on, that their gradient is what the observer reads off the one that passes. So nothing is kept or computed twice for it, and scans,
recomputation, accumulation and pipelines carry and add up what is read as they do any gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp

from plait.kernels import Tokens
from plait.models.looks.look import Everyone, Look, Observer, Statistics

Place = Literal["heads", "residual"]
"""`heads`: `[B, T, H, V]`, finished, before they are projected; `residual`: `[B, T, D]`, the residual stream after the block."""
Sums = Mapping[str, jax.Array]
"""Float32, by name; of heads, those come first."""
Taps = Sequence[Mapping[Place, Sums]]
"""One a layer."""


class GradientObserver(Observer, Protocol):
    """One that may look at gradients too."""

    def taps(self, heads: Sequence[int]) -> Taps:
        """Zeros for layers of so many heads; none where it looks at no gradient."""

    def read(self, place: Place, gradient: jax.Array, x: jax.Array | None, at: Tokens) -> Sums:
        """What adds up over the micro-batches of a step; `x` is that whose gradient it is, of heads."""

    def conclude(self, told: Taps) -> Sequence[Statistics]:
        """The statistics of each layer from the sums over a step."""


@dataclasses.dataclass(frozen=True)
class Tapped:
    """An observer with its taps: of all layers for the stack, of one for a block."""

    observer: Observer
    """A `GradientObserver`, where there are taps."""
    taps: Any
    """Beside them, where heads are left out, which of the layer's are `kept`, bool `[H]` or by row `[B, H]`: the others give zeros to what
    projects them."""
    first_head: int = 0
    """Which head of the layer the first one of a part is."""
    whole: bool = False

    def pick_sequences(self, batch_size: int) -> slice:
        return self.observer.pick_sequences(batch_size)

    def pick_rows(self, length: int) -> jax.Array:
        return self.observer.pick_rows(length)

    def measure(self, looks: tuple[Look, ...]) -> Statistics:
        return self.observer.measure(looks)


def behind(observer: Observer | None, heads: int) -> Observer | None:
    """The observer, for a part of the layer whose heads come after so many others."""
    return dataclasses.replace(observer, first_head=observer.first_head + heads) if isinstance(observer, Tapped) else observer


def everything(observer: Observer | None) -> Observer:
    """An observer of all of a layer, with the taps of this one."""
    return dataclasses.replace(observer, whole=True) if isinstance(observer, Tapped) else Everyone()


def keeping(observer: Observer | None, kept: jax.Array) -> Tapped:
    """The observer, or one that nobody asks, of a layer of which these heads are `kept`, bool `[B, H]`."""
    if not isinstance(observer, Tapped):
        return Tapped(observer or Everyone(), {"heads": {}, "residual": {}, "kept": kept})
    return dataclasses.replace(observer, taps={**observer.taps, "kept": kept & observer.taps.get("kept", True)})


def tapped(observer: Observer | None, place: Place, x: jax.Array, *, at: Tokens) -> jax.Array:
    """`x`, whose gradient the observer will see; of heads those that it keeps."""
    if not isinstance(observer, Tapped):
        return x
    taps = observer.taps[place]
    if place == "heads":
        own = slice(observer.first_head, observer.first_head + x.shape[2])
        taps = jax.tree.map(lambda a: a[own], taps)
        if "kept" in observer.taps:
            x = jnp.where(observer.taps["kept"][..., None, own, None], x, 0)
    if not taps:
        return x
    return _tap(functools.partial(cast(GradientObserver, observer.observer).read, place), place == "heads", x, taps, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(read: Callable[..., Sums], keep: bool, x: jax.Array, taps: Sums, at: Tokens) -> jax.Array:
    return x


def _forward(read: Callable[..., Sums], keep: bool, x: jax.Array, taps: Sums, at: Tokens) -> tuple[jax.Array, Any]:
    return x, (x if keep else None, at)


def _backward(read: Callable[..., Sums], keep: bool, kept: Any, gradient: jax.Array) -> tuple[jax.Array, Sums, None]:
    x, at = kept
    passed = (gradient != 0).any().astype(jnp.float32)  # what an idle tick of a pipeline computes counts for nothing
    return gradient, jax.tree.map(lambda a: passed * a, read(gradient, x, at)), None


_tap.defvjp(_forward, _backward)

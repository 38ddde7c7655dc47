"""Logical axis names of parameters and activations.

Models name what an axis *is*; `plait.train.mesh` holds the one table that says where it lives. Outside a mesh, `constrain` does
nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

LAYERS = "layers"  # stacked periods of the layer pattern
VOCAB = "vocab"
EMBED = "embed"  # d_model of a parameter
HEADS = "heads"  # num_heads * head_dim of a parameter, or the heads of an activation
KV_HEADS = "kv_heads"
MLP = "mlp"
EXPERTS = "experts"
BATCH = "batch"
LENGTH = "length"
NAMES = (LAYERS, VOCAB, EMBED, HEADS, KV_HEADS, MLP, EXPERTS, BATCH, LENGTH)

Axes = tuple[str | None, ...]
Constrain = Callable[[jax.Array, Axes], jax.Array]
_constrain: contextvars.ContextVar[Constrain | None] = contextvars.ContextVar("plait_constrain", default=None)


@contextlib.contextmanager
def constraining(constrain: Constrain) -> Iterator[None]:
    """Apply `constrain(x, axes)` to every activation named inside the block (the trainer passes the mesh's rules)."""
    token = _constrain.set(constrain)
    try:
        yield
    finally:
        _constrain.reset(token)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, with its layout pinned to the mesh axes of `axes` (one name or None per dimension) when a mesh is in use."""
    rule = _constrain.get()
    return x if rule is None else rule(x, axes)

"""The arithmetic of optimizers in float32, whatever the parameters are kept in."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

T = TypeVar("T")
_MOMENT = {optax.ScaleByAdamState: "mu", optax.TraceState: "trace"}
"""The field that holds the first moment, or momentum."""


def in_float32(tx: optax.GradientTransformation, moments: str) -> optax.GradientTransformation:
    """`tx` with every sum, factor and second moment in float32, and first moments kept between steps in the dtype `moments`.

    A moment in bfloat16 is rounded once a step. Its updates are float32: a parameter of another dtype is rounded once when they are
    added.
    """

    def init(params: Any) -> Any:
        return _stored(tx.init(float32(params)), moments)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(float32(grads), _stored(state, "float32"), None if params is None else float32(params))
        return updates, _stored(state, moments)

    return optax.GradientTransformation(init, update)


def float32(tree: T) -> T:
    """A tree with its arrays in float32."""
    return _cast(tree, "float32")


def _cast(tree: T, dtype: str) -> T:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def _stored(state: Any, dtype: str) -> Any:
    """An optimizer's state with its first moments in `dtype`."""

    def one(node: Any) -> Any:
        name = _MOMENT.get(type(node))
        return node if name is None else node._replace(**{name: _cast(getattr(node, name), dtype)})

    return jax.tree.map(one, state, is_leaf=lambda node: type(node) in _MOMENT)

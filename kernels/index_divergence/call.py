"""The call of the indexer's divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax

from plait.kernels.call import OPTION, Call, letters
from plait.kernels.masks import Mask

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DivergenceCall(Call):
    """One call of `plait.kernels.index_divergence`, which says what the fields mean. All heads are summed, so no device has some of them."""

    results: ClassVar[tuple[str, ...]] = ("bt",)

    index_q: Array = field(metadata=letters("bt"))
    index_k: Array = field(metadata=letters("bt"))
    weights: Array = field(metadata=letters("bt"))
    q: Array = field(metadata=letters("bt"))
    k: Array = field(metadata=letters("bt"))
    at: Any = field(metadata=letters("bt"))
    """`Tokens`, placed."""
    kv_at: Any = field(metadata=letters("bt"))
    """`Tokens`, placed."""
    selected: Any = field(metadata=letters("bt"), default=None)
    """`SelectedBlocks`, or None where the mask says all."""
    lse: Any = field(metadata=letters("bt"), default=None)
    """[B, T, H], or None where nobody knows it."""
    mask: Mask = field(metadata=OPTION)
    scale: float = field(metadata=OPTION)

    @property
    def of_queries(self) -> dict[str, Any]:
        """The fields that belong to the queries."""
        return {name: getattr(self, name) for name in ("index_q", "weights", "q", "at", "selected", "lse")}

    def on_keys(self, function: Callable[[Array], Array]) -> Self:
        """The call with `function(x)` in place of each x [B, S, ...] that belongs to the keys."""
        return self.replace(**jax.tree.map(function, {name: getattr(self, name) for name in ("index_k", "k", "kv_at")}))

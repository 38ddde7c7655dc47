"""The call of local linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax

from plait.kernels.attention.call import AttentionCall
from plait.kernels.call import OPTION, letters
from plait.kernels.shapes import check_floating, check_shape

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LocalLinearCall(AttentionCall):
    """One call of `plait.kernels.local_linear`, which says what the fields mean."""

    results: ClassVar[tuple[str, ...]] = ("bthv",)

    probe: Any = field(metadata=letters("bthk"), default=None)
    ridge: float | None = field(metadata=OPTION, default=None)

    @property
    def pair_products(self) -> int:
        """Multiply-adds of a head for a query and a key that it sees."""
        return pair_products(self.q.shape[3], self.v.shape[3], solves=self.probe is None)

    def on_queries(self, function: Callable[[Array], Array]) -> Self:
        """See `AttentionCall.on_queries`."""
        return super().on_queries(function).replace(probe=None if self.probe is None else function(self.probe))

    def _check(self, op: str) -> None:
        super()._check(op)
        if (self.probe is None) == (self.ridge is None):
            raise ValueError(f"{op}: probe and ridge={self.ridge} must not both be there or be missing; pass one of them")
        if self.probe is not None:
            check_floating(op, probe=self.probe)
            check_shape(op, "probe", self.probe, self.q.shape, "[B, T, H, K] as q")
        if self.ridge is not None and self.ridge <= 0:
            raise ValueError(f"{op}: ridge={self.ridge} must be above 0, since the first keys span no space; use 1.0")


def pair_products(key_dim: int, value_dim: int, *, solves: bool) -> int:
    """Multiply-adds for a query and a key: score, product with the probe, value and, to solve for the probe, first and second moments."""
    return 2 * key_dim + value_dim + (key_dim + key_dim**2 if solves else 0)

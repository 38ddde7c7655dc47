"""The calls of the diagonal plus rank one: a recurrence with two more vectors a token."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from plait.kernels.call import letters
from plait.kernels.recurrence import RecurrenceCall, RowsCall
from plait.kernels.shapes import check_floating, check_shape

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DPLRCall(RecurrenceCall):
    """One call of `plait.kernels.dplr`."""

    a: Array = field(metadata=letters("bthk"))
    b: Array = field(metadata=letters("bthk"))

    @property
    def gates(self) -> tuple[Array, ...]:
        """The log decay by channel, and the two vectors."""
        return self.g, self.a, self.b

    def _check(self, op: str) -> None:
        super()._check(op)
        check_floating(op, a=self.a, b=self.b)
        check_shape(op, "g", self.g, (*self.q.shape[:2], self.num_heads, self.q.shape[3]), "[B, T, Hv, K]")
        for name, x in (("a", self.a), ("b", self.b)):
            check_shape(op, name, x, self.k.shape, "[B, T, Hqk, K] as k")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DPLRRowsCall(DPLRCall, RowsCall):
    """One call for rows of the implied attention."""

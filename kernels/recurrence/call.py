"""The call of a linear recurrence, and that of rows of its implied attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from plait.kernels.call import OPTION, Call, letters
from plait.kernels.shapes import (
    check_chunk_size,
    check_divides,
    check_floating,
    check_log_decay,
    check_rank,
    check_shape,
    check_tokens,
    l2_normalize,
    resolved_scale,
)
from plait.kernels.tokens import Tokens

Array = jax.Array

SPAN = 128
"""Tokens that one number of `RecurrenceStats` is about."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RecurrenceCall(Call):
    """One call of a linear recurrence; see the public functions `decay` and `delta_rule`."""

    results: ClassVar[tuple[str, ...]] = ("bthv", "bhkv", "bnh")

    q: Array = field(metadata=letters("bthk"))
    k: Array = field(metadata=letters("bthk"))
    v: Any = field(metadata=letters("bthv"), default=None)
    """None where only the weights on it are wanted."""
    g: Any = field(metadata=letters("bthk"))
    """[B, T, Hv] or [B, T, Hv, K]; None for no decay."""
    beta: Any = field(metadata=letters("bth"), default=None)
    """Of the delta rule; None of a recurrence that decays and adds."""
    segment_ids: Any = field(metadata=letters("bt"), default=None)
    """int32 [B, T]; None for one segment."""
    initial_state: Any = field(metadata=letters("bhkv"), default=None)
    scale: float = field(metadata=OPTION)
    l2_norm_eps: float | None = field(metadata=OPTION, default=None)
    """Under the root that q and k are divided by; None where they are as they should be."""
    chunk_size: int = field(metadata=OPTION, default=64)
    return_stats: bool = field(metadata=OPTION, default=False)

    @classmethod
    def of(cls, op: str, *, at: Tokens | None, scale: float | None, **fields: Any) -> Self:
        """The call of the op's public function, checked, with the default scale filled in.

        Raises:
          ValueError: a shape, ratio, dtype, option or known value does not fit.
        """
        check_rank(op, "q", fields["q"], "[B, T, Hqk, K]")
        check_tokens(op, "at", at, *fields["q"].shape[:2])
        scale = resolved_scale(op, scale, fields["q"].shape[3])
        call = cls(segment_ids=None if at is None else at.segment_ids, scale=scale, **fields)
        call._check(op)
        return call.replace(chunk_size=min(call.chunk_size, SPAN)) if call.return_stats else call

    def normalized(self) -> Self:
        """The same call with q and k divided by their norms, if they are to be."""
        if self.l2_norm_eps is None:
            return self
        unit = partial(l2_normalize, eps=self.l2_norm_eps)
        return self.replace(q=unit(self.q), k=unit(self.k), l2_norm_eps=None)

    @property
    def ids_of_all(self) -> Array:
        """int32 [B, T], also where there is one segment."""
        return jnp.ones(self.q.shape[:2], jnp.int32) if self.segment_ids is None else self.segment_ids

    @property
    def num_heads(self) -> int:
        """Value heads."""
        return next(x for x in (self.v, self.beta, self.g) if x is not None).shape[2]

    @property
    def gates(self) -> tuple[Array, ...]:
        """The log decay by channel, [B, T, Hv, K or 1] and 0 where there is none, and the delta rule's beta."""
        g = jnp.zeros_like(self.beta) if self.g is None else self.g
        g = g[..., None] if g.ndim == 3 else g
        return (g,) if self.beta is None else (g, self.beta)

    def _check(self, op: str) -> None:
        q, v, (batch, length, num_qk_heads, key_dim) = self.q, self.v, self.q.shape
        check_floating(op, q=q, k=self.k)
        check_shape(op, "k", self.k, q.shape, "[B, T, Hqk, K] as q")
        if length < 1:
            raise ValueError(f"{op}: q.shape={q.shape} holds no token; T must be at least 1")
        if v is not None:
            check_rank(op, "v", v, "[B, T, Hv, V]")
            check_floating(op, v=v)
            check_shape(op, "v", v, (batch, length, *v.shape[2:]), "[B, T, Hv, V] with B and T of q")
        if self.initial_state is not None:
            check_shape(op, "initial_state", self.initial_state, (batch, v.shape[2], key_dim, v.shape[3]), "[B, Hv, K, V]")
        check_divides(op, "the number of q and k heads", num_qk_heads, "the number of v heads", self.num_heads)
        sizes = {"[B, T, Hv]": (batch, length, self.num_heads), "[B, T, Hv, K]": (batch, length, self.num_heads, key_dim)}
        for name, gate, legends in (("g", self.g, tuple(sizes)), ("beta", self.beta, ("[B, T, Hv]",))):
            if gate is not None and gate.shape not in [sizes[legend] for legend in legends]:
                allowed = " or ".join(f"{legend} = {sizes[legend]}" for legend in legends)
                raise ValueError(f"{op}: {name}.shape={gate.shape} must be {allowed}; gates live on the value heads")
        if self.g is None and self.beta is None:
            raise ValueError(f"{op}: g=None must be an array; use zeros for no decay")
        if self.l2_norm_eps is not None and not self.l2_norm_eps > 0:
            raise ValueError(
                f"{op}: l2_norm_eps={self.l2_norm_eps} must be above 0; use 1e-6, or None for q and k that are normalised"
            )
        check_log_decay(op, self.g)
        check_chunk_size(op, self.chunk_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowsCall(RecurrenceCall):
    """One call for rows of the implied attention, which has no values and no initial state."""

    results: ClassVar[tuple[str, ...]] = ("bhrt", "bhrk")

    rows: Array = field(metadata=letters("r"))
    """int32 [R] token indices; -1 lies beyond the last token."""
    reader: Any = field(metadata=letters("bhrk"), default=None)
    """What rows of -1 start as there, [B, Hv, R, K]."""

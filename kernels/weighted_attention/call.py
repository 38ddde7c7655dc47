"""The call of attention by a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from plait.kernels.call import OPTION, Call, letters
from plait.kernels.masks import Mask
from plait.kernels.shapes import check_divides, check_floating, check_shape, check_tokens
from plait.kernels.tokens import Tokens
from plait.kernels.weighted_attention.rule import Rule

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WeightedCall(Call):
    """One call of `plait.kernels.weighted_attention`, which says what the fields mean. Rules may mix heads, so a mesh splits rows only."""

    results: ClassVar[tuple[str, ...]] = ("b",)

    q: Array = field(metadata=letters("b"))
    """[B, halo + T, H, ...]: the queries behind those that came before them."""
    k: Array = field(metadata=letters("b"))
    v: Any = field(metadata=letters("b"), default=None)
    """None where only the weights are wanted."""
    queries: Tokens = field(metadata=letters("b"))
    """[B, halo + T], filled in."""
    keys: Tokens = field(metadata=letters("b"))
    """[B, S], filled in."""
    parameters: Any = field(metadata=letters(""), default=None)
    rule: Rule = field(metadata=OPTION)
    mask: Mask = field(metadata=OPTION)
    own_keys: bool = field(metadata=OPTION, default=True)
    """The keys are the queries' own tokens, in order."""

    @classmethod
    def of(
        cls,
        op: str,
        *,
        q: Array,
        k: Array,
        v: Array | None,
        rule: Rule,
        at: Tokens | None,
        kv_at: Tokens | None,
        before: tuple[Array, Tokens] | None,
        **fields: Any,
    ) -> Self:
        """The call of the op's public function, checked.

        Raises:
          ValueError: a shape, ratio or known segment id does not fit.
        """
        check_floating(op, q=q, k=k)
        batch, length = q.shape[:2]
        num_keys, num_kv_heads = k.shape[1:3]
        check_divides(op, "the number of k and v heads", num_kv_heads, "the number of q heads", q.shape[2])
        if v is not None:
            check_floating(op, v=v)
            check_shape(op, "v", v, (batch, num_keys, num_kv_heads, v.shape[-1]), "[B, S, Hkv, V] with B, S and Hkv of k")
        check_tokens(op, "at", at, batch, length)
        check_tokens(op, "kv_at", kv_at, batch, num_keys, in_order=False)
        if kv_at is None and num_keys != length:
            raise ValueError(f"{op}: k has S={num_keys} tokens and q has T={length}; say with kv_at what the keys are")
        queries = _known(at or Tokens()).placed(batch, length)
        keys = queries if kv_at is None else _known(kv_at).placed(batch, num_keys)
        if rule.halo:
            earlier, earlier_at = before or _nothing(q, rule.halo)
            check_shape(op, "before[0]", earlier, (batch, rule.halo, *q.shape[2:]), "[B, halo, H, ...] of q")
            q = jnp.concatenate([earlier.astype(q.dtype), q], axis=1)
            queries = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), _known(earlier_at), queries)
        return cls(q=q, k=k, v=v, rule=rule, queries=queries, keys=keys, own_keys=kv_at is None, **fields)

    @property
    def length(self) -> int:
        """Queries that are answered."""
        return self.q.shape[1] - self.rule.halo

    def on_queries(self, function: Callable[[Array], Array]) -> Self:
        """The call with `function(x)` in place of each x [B, halo + T, ...] that belongs to the queries."""
        return self.replace(q=function(self.q), queries=jax.tree.map(function, self.queries))

    def on_keys(self, function: Callable[[Array], Array]) -> Self:
        """The call with `function(x)` in place of each x [B, S, ...] that belongs to the keys."""
        return self.replace(k=function(self.k), v=jax.tree.map(function, self.v), keys=jax.tree.map(function, self.keys))


def _known(tokens: Tokens) -> Tokens:
    """What the op needs of the tokens."""
    return Tokens(segment_ids=tokens.segment_ids, positions=tokens.positions)


def _nothing(q: Array, halo: int) -> tuple[Array, Tokens]:
    """Padding before the first query."""
    zero = jnp.zeros((q.shape[0], halo), jnp.int32)
    return jnp.zeros((q.shape[0], halo, *q.shape[2:]), q.dtype), Tokens(None, zero, zero)

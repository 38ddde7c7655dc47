"""The call of attention, and those of the ops beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from plait.kernels.attention.bias import Bias, LowRankBias
from plait.kernels.call import OPTION, Call, letters
from plait.kernels.masks import Mask, SelectedBlocks
from plait.kernels.shapes import (
    accumulation_dtype,
    check_divides,
    check_floating,
    check_rank,
    check_shape,
    check_tokens,
    resolved_scale,
)
from plait.kernels.tokens import Tokens

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionCall(Call):
    """One call of `plait.kernels.attention`, which says what the fields mean."""

    results: ClassVar[tuple[str, ...]] = ("bthv", "bth")

    q: Array = field(metadata=letters("bthk"))
    k: Array = field(metadata=letters("bthk"))
    v: Any = field(metadata=letters("bthv"), default=None)
    """None where only the weights are wanted."""
    at: Any = field(metadata=letters("bt"), default=None)
    """`Tokens`, or None for one segment from position 0."""
    kv_at: Any = field(metadata=letters("bt"), default=None)
    """`Tokens`, or None where the keys are the queries' own tokens."""
    selected: Any = field(metadata=letters("bth"), default=None)
    """`SelectedBlocks`, or None where the mask says all."""
    sinks: Any = field(metadata=letters("h"), default=None)
    """[H], or None."""
    query_sinks: Any = field(metadata=letters("bth"), default=None)
    """[B, T, H] where each query has its own, or None."""
    sigmoid_bias: Any = field(metadata=letters("h"), default=None)
    """[H] of the sigmoid."""
    bias: Any = field(metadata=letters("h"), default=None)
    """`DistanceBias`, or None: one of low rank is among the columns of q and k."""
    mask: Mask = field(metadata=OPTION)
    scale: float = field(metadata=OPTION)
    normalizer: str = field(metadata=OPTION, default="softmax")
    logit_soft_cap: float | None = field(metadata=OPTION, default=None)
    return_stats: bool = field(metadata=OPTION, default=False)
    kv_in_order: bool = field(metadata=OPTION, default=False)
    """Keys that are not the queries' own tokens are tokens of their documents nonetheless, each segment's one after the other."""
    values_in_keys: bool = field(metadata=OPTION, default=False)
    """v is the first channels of k."""
    return_lse: bool = field(metadata=OPTION, default=False)
    """Of a softmax, in place of `return_stats`: of the statistics the log-normaliser alone is returned."""
    whole: Any = field(metadata=letters("bth"), default=None)
    """(o [B, T, H, V], lse [B, T, H]) over all keys, of which k and v are some, or None. With it, only gradients are asked for: those of
    these keys' share in the whole; the forward pass need not run, and the results may have any values. With `return_lse` only."""

    @classmethod
    def of(
        cls,
        op: str,
        *,
        q: Array,
        k: Array,
        v: Array | None = None,
        value_dim: int | None = None,
        at: Tokens | None = None,
        kv_at: Tokens | None = None,
        scale: float | None = None,
        sinks: Array | None = None,
        sigmoid_bias: Array | float | None = None,
        bias: Bias | None = None,
        **fields: Any,
    ) -> Self:
        """The call of the op's public function, checked, with the default scale filled in and the bias folded in.

        Raises:
          ValueError: a shape, ratio, dtype, option or known segment id does not fit.
        """
        check_rank(op, "q", q, "[B, T, H, K]")
        check_rank(op, "k", k, "[B, S, Hkv, K]")
        if sigmoid_bias is not None:
            sigmoid_bias = jnp.asarray(sigmoid_bias, accumulation_dtype(q, k))
            if sigmoid_bias.ndim:
                check_shape(op, "sigmoid_bias", sigmoid_bias, (q.shape[2],), "a number or [H]")
            sigmoid_bias = jnp.broadcast_to(sigmoid_bias, (q.shape[2],))
        scale = resolved_scale(op, scale, q.shape[3])
        by_distance = None
        if isinstance(bias, LowRankBias):
            q, k = bias.folded(op, q, k, scale)
        elif bias is not None:
            bias.check(op, q.shape[2])
            by_distance = bias
        if sinks is not None:
            fields["sinks" if sinks.ndim == 1 else "query_sinks"] = sinks
        if value_dim is not None:
            if v is not None or not 1 <= value_dim <= k.shape[3]:
                raise ValueError(
                    f"{op}: value_dim={value_dim} takes the values from the first channels of k, of which there are K={k.shape[3]}; "
                    "pass no v with it, and at most K"
                )
            fields["v"], fields["values_in_keys"] = k[..., :value_dim], True
        else:
            fields["v"] = v
        call = cls(
            q=q, k=k, at=_known(at), kv_at=_known(kv_at), scale=scale, sigmoid_bias=sigmoid_bias, bias=by_distance, **fields
        )
        call._check(op)
        return call

    @property
    def own_keys(self) -> bool:
        """The keys are the queries' own tokens, in order."""
        return self.kv_at is None

    @property
    def document_keys(self) -> bool:
        """The keys are tokens of the queries' documents, each segment's one after the other, so that blocks of them can be found."""
        return self.own_keys or self.kv_in_order

    def arrays(self) -> Iterator[tuple[str, str, Any]]:
        """See `Call.arrays`. Keys that are not the queries' own tokens are no part of their sequence: every device has all."""
        for name, axes, value in super().arrays():
            foreign = name in ("k", "v", "kv_at") and not self.own_keys
            yield name, axes.replace("t", "j") if foreign else axes, value

    @property
    def follows_choice(self) -> bool:
        """Work is as much for every query as it chooses. Tokens that each key head chooses by itself most forms find among all."""
        return self.selected is not None and (self.selected.block_size > 1 or self.values_in_keys)

    @property
    def packed(self) -> bool:
        """There may be several segments."""
        return self.at is not None or self.kv_at is not None

    @property
    def sigmoid(self) -> bool:
        """The weights are not normalised."""
        return self.normalizer == "sigmoid"

    @property
    def sides(self) -> tuple[Tokens, Tokens]:
        """The tokens of queries and keys, filled in."""
        queries = (self.at or Tokens()).placed(*self.q.shape[:2])
        return queries, queries if self.kv_at is None else self.kv_at.placed(*self.k.shape[:2])

    @property
    def sink_logits(self) -> Array | None:
        """[B or 1, T or 1, H], or None."""
        return self.query_sinks if self.sinks is None else self.sinks[None, None]

    def on_queries(self, function: Callable[[Array], Array]) -> Self:
        """The call with `function(x)` in place of each x [B, T, ...] that belongs to the queries."""
        others = {name: getattr(self, name) for name in ("at", "query_sinks", "selected")}
        return self.replace(q=function(self.q), **jax.tree.map(function, others))

    def _check(self, op: str) -> None:
        q, k, v = self.q, self.k, self.v
        check_floating(op, q=q, k=k)
        batch, length, num_heads, key_dim = q.shape
        num_keys, num_kv_heads = k.shape[1:3]
        check_shape(op, "k", k, (batch, num_keys, num_kv_heads, key_dim), "[B, S, Hkv, K] with B and K of q")
        if v is not None:
            check_rank(op, "v", v, "[B, S, Hkv, V]")
            check_floating(op, v=v)
            check_shape(op, "v", v, (batch, num_keys, num_kv_heads, v.shape[3]), "[B, S, Hkv, V] with B, S and Hkv of k")
        check_divides(op, "the number of k and v heads", num_kv_heads, "the number of q heads", num_heads)
        check_tokens(op, "at", self.at, batch, length)
        check_tokens(op, "kv_at", self.kv_at, batch, num_keys, in_order=False)
        if self.own_keys and num_keys != length:
            raise ValueError(
                f"{op}: k has S={num_keys} tokens and q has T={length}; they must be equal unless kv_at says what the keys are; "
                "pass it"
            )
        _check_selected(op, q, self.selected)
        if self.sinks is not None:
            check_shape(op, "sinks", self.sinks, (num_heads,), "[H]")
        if self.query_sinks is not None:
            check_shape(op, "sinks", self.query_sinks, q.shape[:3], "[H] or [B, T, H]")
        if self.normalizer not in ("softmax", "sigmoid"):
            raise ValueError(f"{op}: normalizer={self.normalizer!r} is unknown; use 'softmax' or 'sigmoid'")
        if self.sigmoid != (self.sigmoid_bias is not None):
            raise ValueError(
                f"{op}: sigmoid_bias={self.sigmoid_bias} with normalizer={self.normalizer!r}; the sigmoid needs one and softmax takes "
                "none; use -log(longest training sequence) or None"
            )
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise ValueError(f"{op}: logit_soft_cap={self.logit_soft_cap} must be above 0; use None for no cap")
        if self.sigmoid and self.sink_logits is not None:
            raise ValueError(f"{op}: sinks with normalizer='sigmoid' have no denominator to join; use sinks=None")
        if self.return_lse and self.return_stats:
            raise ValueError(
                f"{op}: return_lse=True asks for lse alone, which return_stats=True gives among others; use one of them"
            )
        if self.return_lse and self.sigmoid:
            raise ValueError(f"{op}: return_lse=True needs normalizer='softmax', not 'sigmoid'; use return_stats=True")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RoutedCall(AttentionCall):
    """One call of `plait.kernels.routed_attention`."""

    results: ClassVar[tuple[str, ...]] = ("bthv",)

    active: Array = field(metadata=letters("bth"))

    def on_queries(self, function: Callable[[Array], Array]) -> Self:
        """See `AttentionCall.on_queries`."""
        return super().on_queries(function).replace(active=function(self.active))

    def _check(self, op: str) -> None:
        super()._check(op)
        check_shape(op, "active", self.active, self.q.shape[:3], "[B, T, H]")
        if self.active.dtype != bool:
            raise ValueError(f"{op}: active.dtype={self.active.dtype} must be bool; compare it with 0")
        if self.query_sinks is not None:
            raise ValueError(
                f"{op}: sinks.shape={self.query_sinks.shape} must be [H]; attend with all heads, and zero the others"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MassCall(AttentionCall):
    """One call of `plait.kernels.column_mass` or `first_masses`."""

    results: ClassVar[tuple[str, ...]] = ("bth",)

    lse: Array = field(metadata=letters("bth"))

    def on_queries(self, function: Callable[[Array], Array]) -> Self:
        """See `AttentionCall.on_queries`."""
        return super().on_queries(function).replace(lse=function(self.lse))

    def _check(self, op: str) -> None:
        super()._check(op)
        check_shape(op, "lse", self.lse, self.q.shape[:3], "[B, T, H] of q")
        check_floating(op, lse=self.lse)


def _known(tokens: Tokens | None) -> Tokens | None:
    """What the op needs of the tokens; None where that is nothing."""
    if tokens is None or (tokens.segment_ids is None and tokens.positions is None):
        return None
    return Tokens(segment_ids=tokens.segment_ids, positions=tokens.positions)


def _check_selected(op: str, q: Array, selected: SelectedBlocks | None) -> None:
    if selected is None:
        return
    for name in ("block_size", "num_blocks"):
        if (value := getattr(selected, name)) < 1:
            raise ValueError(
                f"{op}: selected.{name}={value} must be at least 1; use 64 tokens, and as many as the longest segment has"
            )
    indices, heads = selected.indices, q.shape[2]
    check_rank(op, "selected.indices", indices, "[B, T, Hs, N]")
    if indices.dtype != jnp.int32:
        raise ValueError(f"{op}: selected.indices.dtype={indices.dtype} must be int32; cast it")
    expected = (*q.shape[:2], *indices.shape[2:])
    check_shape(op, "selected.indices", indices, expected, "[B, T, Hs, N] with B and T of q")
    check_divides(op, "the number of selecting heads", indices.shape[2], "the number of q heads", heads)

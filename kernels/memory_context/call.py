"""The call of attention whose context a memory gives, and which the memory learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from plait.kernels.call import OPTION, Call, letters
from plait.kernels.online_memory.call import Borders, borders
from plait.kernels.online_memory.rule import Rule, Weights
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


class Learned(NamedTuple):
    """What the memory learns of some tokens, before its convolutions: `[B, T, D]` each, and gates `[B, T, H]` float32."""

    q: Array
    k: Array
    v: Array
    g: Array
    step: Array
    momentum: Array


class Layers(Protocol):
    """The layer's projections: a pytree, since what it holds is traced."""

    num_heads: int

    def keys_values(self, y: Array, positions: Array) -> tuple[Array, Array]:
        """Keys and values `[B, T, H, K]` of the attention, of y `[B, T, D]` at positions `[B, T]`."""

    def learned(self, y: Array) -> Learned:
        """What the memory learns of what attention gives, y `[B, T, D]`."""

    def taps(self) -> tuple[Array, Array, Array]:
        """Weights `[W, D]` of the convolutions on the memory's q, k and v."""

    def heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """The convolved ones by head, `[B, T, H, K]`, as the memory takes them."""


class ContextState(NamedTuple):
    """What the layer remembers of the tokens so far."""

    accumulated: Weights
    """Of the memory, as in `MemoryState`, and the next two."""
    momentum: Weights
    opened: Weights
    slots: tuple[Array, ...]
    """`[B, C, H, K]` each: keys and values of the open segment's tokens, and those of what the memory gave to them, by place in it."""
    filled: Array
    """bool `[B, C]`: which hold a token."""
    convs: tuple[Array, ...]
    """`[B, W - 1, D]` each: last inputs of the memory's convolutions on q, k and v."""
    chunk: Array
    """int32 `[B]`: the number of the open segment in its document, -1 before the first token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ContextCall(Call):
    """One call of `plait.kernels.memory_context`. Rows are divided among devices, heads (a) are not: what attention gives to all of them is
    what each head's memory learns from."""

    results: ClassVar[tuple[str, ...]] = ("btd", "btak", "baio", "baio", "baio", "bcak", "bc", "bwd", "b")

    reads: Array = field(metadata=letters("btak"))
    q: Array = field(metadata=letters("btak"))
    k: Array = field(metadata=letters("btak"))
    v: Array = field(metadata=letters("btak"))
    persistent_logits: Array = field(metadata=letters("btap"))
    persistent_values: Array = field(metadata=letters("pak"))
    layers: Any = field(metadata=letters(""))
    initial: Weights = field(metadata=letters("aio"))
    segment_ids: Array = field(metadata=letters("bt"))
    positions: Array = field(metadata=letters("bt"))
    accumulated: Weights = field(metadata=letters("baio"))
    speed: Weights = field(metadata=letters("baio"))
    opened: Weights = field(metadata=letters("baio"))
    slots: tuple[Array, ...] = field(metadata=letters("bcak"))
    filled: Array = field(metadata=letters("bc"))
    convs: tuple[Array, ...] = field(metadata=letters("bwd"))
    chunk: Array = field(metadata=letters("b"))
    rule: Rule = field(metadata=OPTION)

    @property
    def dtype(self) -> Any:
        """That of sums and states."""
        return accumulation_dtype(self.q)

    @property
    def borders(self) -> Borders:
        """Where segments begin."""
        return borders(self.segment_ids, self.positions, self.chunk, self.rule.chunk_size)

    def fresh(self) -> Weights:
        """The learned memory that a document begins with, `[1, H, I, O]` a layer."""
        return tuple(w.astype(self.dtype)[None] for w in self.initial)


def write(slots: tuple[Array, ...], filled: Array, new: tuple[Array, ...], place: Array, mine: Array) -> tuple[Any, Array]:
    """The slots with the tokens `mine` `[B, T]` at their `place` in the segment."""
    place = jnp.where(mine, place, filled.shape[1])  # out of range: dropped
    row = jnp.arange(filled.shape[0])[:, None]
    put = lambda old, new: old.at[row, place].set(new, mode="drop")
    return tuple(put(old, one.astype(old.dtype)) for old, one in zip(slots, new, strict=True)), put(filled, mine)


def attend(call: ContextCall, q: Array, logits: Array, slots: tuple[Array, ...], filled: Array, place: Array) -> Array:
    """Softmax attention of q `[B, T, H, K]` to the persistent tokens, of these logits `[B, T, H, P]`, and to the slots up to its place,
    those of tokens and those of the memory's reads; `[B, T, D]` in q's dtype."""
    k, v = (jnp.concatenate([slots[i], slots[i + 2]], axis=1).astype(call.dtype) for i in (0, 1))
    seen = filled[:, None] & (jnp.arange(filled.shape[1])[None, None] <= place[..., None])
    seen = jnp.concatenate([seen, seen], axis=-1)[:, :, None]
    z = jnp.einsum("bthk,bshk->bths", q.astype(call.dtype), k, precision="highest") * q.shape[-1] ** -0.5
    z = jnp.concatenate([jnp.where(seen, z, -1e30), logits.astype(call.dtype)], axis=-1)
    weights = jax.nn.softmax(z, axis=-1)
    own, persistent = jnp.split(weights, [seen.shape[-1]], axis=-1)
    o = jnp.einsum("bths,bshk->bthk", own, v, precision="highest")
    o = o + jnp.einsum("bthp,phk->bthk", persistent, call.persistent_values.astype(call.dtype), precision="highest")
    return o.reshape(*o.shape[:2], -1).astype(q.dtype)

"""Masks of heads that see different keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from plait.kernels.masks.mask import Mask


class HeadGroup(NamedTuple):
    """Heads under one mask, each key head of which has as many of them."""

    mask: Mask
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class HeadMasks:
    """A mask for each head, where they differ; hashable, and taken by the ops of attention in place of a mask.

    An op then runs once for the heads of each mask, so that every run is one of an ordinary mask: kernels skip its hidden tiles, the
    plain form slices its range of keys, and parts of sequences exchange what it reaches. One run under the union of the masks, with
    the difference hidden by head, would visit and fetch that union for all heads.
    """

    masks: tuple[Mask, ...]
    """One a query head."""

    def __post_init__(self) -> None:
        if len({mask.causal for mask in self.masks}) != 1:
            raise ValueError(f"mask.masks={self.masks} must all look back, or all both ways; give them the same `causal`")

    @property
    def causal(self) -> bool:
        """A query sees no key at a later position."""
        return self.masks[0].causal

    @property
    def sees_all(self) -> bool:
        """Nothing but causality hides a key, from any head."""
        return all(mask.sees_all for mask in self.masks)

    def groups(self, num_kv_heads: int) -> Iterator[HeadGroup]:
        """The heads by mask: head h has key head h // (H / Hkv), and of a group every key head has as many heads."""
        share = len(self.masks) // num_kv_heads
        of = [(mask, h // share) for h, mask in enumerate(self.masks)]
        counts = Counter(of)
        for key in dict.fromkeys((mask, counts[mask, kv]) for mask, kv in of):
            heads = tuple(h for h, (mask, kv) in enumerate(of) if (mask, counts[mask, kv]) == key)
            yield HeadGroup(key[0], heads, tuple(dict.fromkeys(h // share for h in heads)))

"""The call of block selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from plait.kernels.call import OPTION, Call, letters

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TopkCall(Call):
    """One call of `plait.kernels.topk_blocks`, which says what the fields mean."""

    results: ClassVar[tuple[str, ...]] = ("bth",)

    q: Array = field(metadata=letters("bthk"))
    blocks: Array = field(metadata=letters("bjhk"))
    at: Any = field(metadata=letters("bt"))
    """`Tokens`, placed."""
    blocks_at: Any = field(metadata=letters("bj"))
    """`Tokens`, with numbers of blocks as positions."""
    top_k: int = field(metadata=OPTION)
    block_size: int = field(metadata=OPTION)
    num_local: int = field(metadata=OPTION)
    num_first: int = field(metadata=OPTION)
    by_group: bool = field(metadata=OPTION)
    scale: float | None = field(metadata=OPTION)
    num_blocks: int = field(metadata=OPTION)
    stride: Any = field(metadata=OPTION, default=None)
    """int, or None where blocks are scored themselves."""
    span: Any = field(metadata=OPTION, default=None)
    """int with a stride, or None."""
    weights: Any = field(metadata=letters("bth"), default=None)
    """[B, T, H], or None where scores are the products themselves."""

    @property
    def tokens_alone(self) -> bool:
        """Whether what is chosen are tokens, by their scores alone."""
        forced = self.num_local or self.num_first
        return self.block_size == 1 and not forced and self.scale is None and self.stride is None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TogetherCall(TopkCall):
    """One whose heads all choose together: no device has some of them alone."""

    results: ClassVar[tuple[str, ...]] = ("bt",)

    q: Array = field(metadata=letters("bt"))
    blocks: Array = field(metadata=letters("bj"))
    weights: Any = field(metadata=letters("bt"), default=None)

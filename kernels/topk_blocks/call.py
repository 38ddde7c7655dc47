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
    """One call of `plait.kernels.topk_blocks`."""

    results: ClassVar[tuple[str, ...]] = ("bhqk",)

    q: Array = field(metadata=letters("bthk"))
    k: Array = field(metadata=letters("bthk"))
    segment_ids: Any = field(metadata=letters("bt"))
    top_k: int = field(metadata=OPTION)
    block_kv: int = field(metadata=OPTION)
    block_q: int = field(metadata=OPTION)
    num_local: int = field(metadata=OPTION)
    num_first: int = field(metadata=OPTION)
    by_group: bool = field(metadata=OPTION)

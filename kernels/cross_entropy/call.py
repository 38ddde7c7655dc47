"""The call of cross entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from plait.kernels.call import OPTION, Call, letters

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CrossEntropyCall(Call):
    """One call of `plait.kernels.cross_entropy`."""

    results: ClassVar[tuple[str, ...]] = ("bs", "bs")

    hidden: Array = field(metadata=letters("bsd"))
    weight: Array = field(metadata=letters("dv"))
    targets: Array = field(metadata=letters("bs"))
    loss_mask: Array = field(metadata=letters("bs"))
    """bool [B, T]."""
    logit_soft_cap: Any = field(metadata=OPTION)
    chunk_size: Any = field(metadata=OPTION)

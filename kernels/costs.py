"""What a kernel says to XLA of its work: XLA cannot look inside, and lays exchange between devices beside what takes as long."""

import math
from collections.abc import Iterable
from typing import Any

from jax.experimental import pallas as pl


def cost(arrays: Iterable[Any], *, flops: float, transcendentals: float = 0) -> pl.CostEstimate:
    """The work of one call.

    Args:
      arrays: its operands and results, or their shapes; each moves once.
      flops: operations of its matrix products.
      transcendentals: exponentials and the like.
    """
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=int(flops), transcendentals=int(transcendentals), bytes_accessed=moved)

"""The call of the short convolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.kernels.call import OPTION, Call, letters

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ShortConvCall(Call):
    """One call of `plait.kernels.short_conv`."""

    results: ClassVar[tuple[str, ...]] = ("bth", "bwh")

    x: Array = field(metadata=letters("bth"))
    weight: Array = field(metadata=letters("wh"))
    bias: Any = field(metadata=letters("h"))
    initial_state: Any = field(metadata=letters("bwh"))
    segment_ids: Any = field(metadata=letters("bt"))
    activation: Any = field(metadata=OPTION)

    @property
    def reach(self) -> int:
        """Taps before the current token."""
        return self.weight.shape[0] - 1

    @property
    def before(self) -> Array:
        """The inputs [B, W-1, D] before the first token, in x's dtype."""
        if self.initial_state is not None:
            return self.initial_state.astype(self.x.dtype)
        return jnp.zeros((self.x.shape[0], self.reach, self.x.shape[2]), self.x.dtype)

"""The call of the selective scan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from plait.kernels.call import OPTION, Call, letters
from plait.kernels.linear_scan.call import real_and_starts
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SelectiveScanCall(Call):
    """One call of `plait.kernels.selective_scan`."""

    results: ClassVar[tuple[str, ...]] = ("bth", "bkh")

    x: Array = field(metadata=letters("bth"))
    dt: Any = field(metadata=letters("bth"))
    A: Array = field(metadata=letters("kh"))
    B: Any = field(metadata=letters("btk"))
    C: Any = field(metadata=letters("btk"))
    fixed_C: Any = field(metadata=letters("kh"))
    """One of the two is None."""
    initial_state: Any = field(metadata=letters("bkh"))
    segment_ids: Any = field(metadata=letters("bt"))
    chunk_size: int = field(metadata=OPTION)

    @property
    def dtype(self) -> Any:
        """Of states and sums."""
        return accumulation_dtype(self.x)

    @property
    def start(self) -> Array:
        """The state [B, N, D] before the first token."""
        zeros = jnp.zeros((self.x.shape[0], *self.A.shape), self.dtype)
        return zeros if self.initial_state is None else self.initial_state.astype(self.dtype)

    @property
    def steps(self) -> Array:
        """dt [B, T, D or 1], 0 at padding."""
        dt = jnp.ones((*self.x.shape[:2], 1), self.dtype) if self.dt is None else self.dt.astype(self.dtype)
        real, _ = real_and_starts(self.segment_ids)
        return dt if real is None else jnp.where(real[..., None], dt, 0)

    @property
    def log_decay(self) -> Array:
        """What a sequence of one segment does to the state that enters it, [B, N, D]."""
        return self.steps.sum(1)[:, None, :] * self.A.astype(self.dtype)[None]

    def read(self, s: Array, C: Array | None) -> Array:
        """y [..., D] of states [..., N, D] of tokens whose C is [..., N]."""
        if C is None:
            return jnp.einsum("...nd,nd->...d", s, self.fixed_C.astype(s.dtype), precision="highest")
        return jnp.einsum("...nd,...n->...d", s, C, precision="highest")

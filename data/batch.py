"""The one shape in which tokens reach a training or evaluation step."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
"""NumPy on the host, a JAX array in a step."""


class Batch(NamedTuple):
    """Packed rows: B rows of T tokens, all arrays [B, T].

    `targets[b, t]` follows `tokens[b, t]` in the same document; after a document's last token it is end-of-text.
    Pieces of different documents in a row differ in `segment_ids` (1, 2, ... in a row; 0 is padding), and `positions`
    restart at 0 in each. A named tuple is a pytree to JAX, so a batch can be placed and sharded as it is.
    """

    tokens: Array  # int32
    targets: Array  # int32
    segment_ids: Array  # int32
    positions: Array  # int32
    loss_mask: Array  # float32: 1 where the target counts, 0 on padding

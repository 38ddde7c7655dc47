"""The one shape in which tokens reach a training or evaluation step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Packed rows: B rows of T tokens, all arrays [B, T].

    `targets[b, t]` follows `tokens[b, t]` in the same document; after a document's last token it is end-of-text.
    Pieces of different documents in a row differ in `segment_ids` (1, 2, ... in a row; 0 is padding), and `positions`
    restart at 0 in each. A named tuple is a pytree to JAX, so a batch can be placed and sharded as it is.
    """

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32
    segment_ids: np.ndarray  # int32
    positions: np.ndarray  # int32
    loss_mask: np.ndarray  # float32: 1 where the target counts, 0 on padding

"""QK-clip: after each step, queries and keys of heads whose logits grew too large are scaled back."""

from __future__ import annotations

import dataclasses

from plait.configs.components import Config
from plait.configs.domains import Positive, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKClipConfig(Config):
    """QK-clip of MuonClip (Kimi K2, 2507.20534), with any optimizer.

    A head whose largest logit S in the step is above the threshold t has r = t / S; after the update its query projection is multiplied
    by r^alpha and its key projection by r^(1 - alpha). A key that several heads share, or that is the value too, is left alone, and what
    meets it of the query is multiplied by r: in latent attention the rotated channels, in grouped-query attention the whole head.
    """

    path = "model.qk_clip"

    threshold: Positive | None = None
    """Largest logit of a head that is left as it is (Kimi K2: 100); None clips nothing."""
    alpha: Share = 0.5
    """How much of the clipping the queries take."""

    def check(self) -> None:
        if self.alpha != type(self).alpha and self.threshold is None:
            raise ValueError(f"alpha={self.alpha} is of a threshold, and there is none; set threshold, or leave alpha out")

"""How much the learning rate matters to models of several sizes, and what makes it matter less."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, each, product, zipped

WIDTHS = (32, 64, 128)


@SWEEPS.register("learning_rate", source="Small-scale proxies for large-scale Transformer training instabilities (2309.14322)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateSweep(SweepConfig):
    """Final loss over three decades of learning rates, for softmax models of three widths, with and without QK-norm.

    Command: `python launch.py sweep learning_rate --out sweeps/learning_rate`. 126 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        size = zipped(
            each("model.d_model", *WIDTHS),
            each("model.mixers.softmax.num_heads", *(width // 16 for width in WIDTHS)),
            each("model.channel_mixer.hidden_dim", *(2 * width for width in WIDTHS)),
        )
        return product(
            each("model.pattern", "softmax"),
            each("steps", 200),
            size,
            each("model.mixers.softmax.qk_norm", False, True),
            each("optimizer.learning_rate", 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        )

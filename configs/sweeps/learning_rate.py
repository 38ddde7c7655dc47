"""How much the learning rate matters to models of several sizes, and what makes it matter less."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product, zipped

WIDTHS = (32, 64)
RATES = (3e-3, 3e-2, 3e-1)


@SWEEPS.register("learning_rate", source="Small-scale proxies for large-scale Transformer training instabilities (2309.14322)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateSweep(SweepConfig):
    """Loss over two decades of learning rates, for softmax models of two widths: plain, with QK-norm, z-loss, sigmaReparam, by Muon.

    Claimed: QK-norm lowers the sensitivity to the rate, z-loss mends only runs whose output logits diverge, and sensitivity grows with size.
    Muon's rate is that of all parameters. At scale: `--preset transformer_340m`, with widths and rates of one's own.

    Command: `python launch.py sweep learning_rate --out sweeps/learning_rate`. 90 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        size = zipped(
            each("model.d_model", *WIDTHS),
            each("model.mixers.softmax.num_heads", *(width // 16 for width in WIDTHS)),
            each("model.channel_mixer.hidden_dim", *(2 * width for width in WIDTHS)),
        )
        arms = chain(
            ({},),
            each("model.mixers.softmax.qk_norm", True),
            each("model.z_loss", 1e-4),
            each("model.sigma_reparam", "spectral"),
            each("optimizer", "muon"),
        )
        told = {"probe_every": None, "eval_every": None, "eval_batches": 8, "checkpoint_every": None, "log_every": 5}
        return product(({"model.pattern": "softmax", "steps": 100, **told},), size, arms, each("optimizer.learning_rate", *RATES))

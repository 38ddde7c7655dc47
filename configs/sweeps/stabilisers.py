"""What keeps attention from collapsing where the learning rate is too large."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

SOFTMAX = "model.mixers.softmax"


@SWEEPS.register("stabilisers", source="Stabilizing Transformer Training by Preventing Attention Entropy Collapse (2303.06296)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilisersSweep(SweepConfig):
    """At a rate that is too large: sigmaReparam, QK-norm, QK-clip, soft cap, sigmoid, gate and sinks, with and without warm-up.

    Claimed by the authors of sigmaReparam: training that becomes unstable has a sharp fall of attention entropy; with it models train without
    warm-up. QK-norm is claimed to do so by 2309.14322, QK-clip by 2507.20534, soft caps by 2408.00118; sigmoid attention (2409.04431),
    gates (2505.06708) and learned sinks (GPT-OSS) are claimed to train more stably. Four layers on bytes, at a constant rate of 0.1.

    Command: `python launch.py sweep stabilisers --out sweeps/stabilisers`. 48 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        arms = chain(
            ({},),
            each("model.sigma_reparam", "spectral"),
            each(f"{SOFTMAX}.qk_norm", True),
            each("model.qk_clip.threshold", 20.0),
            each(f"{SOFTMAX}.logit_soft_cap", 20.0),
            each(f"{SOFTMAX}.normalizer", "sigmoid"),
            each(f"{SOFTMAX}.gate", "elementwise"),
            each(f"{SOFTMAX}.sink_logits", True),
        )
        model = {"model.pattern": "softmax", "model.num_layers": 4}
        training = {"steps": 150, "optimizer.learning_rate": 0.1, "optimizer.schedule": "constant"}
        told = {"probe_every": 10, "eval_every": 50, "eval_batches": 8, "checkpoint_every": None}
        return product(({**model, **training, **told},), each("optimizer.warmup_steps", 0, 100), arms)

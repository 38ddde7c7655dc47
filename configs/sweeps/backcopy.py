"""What a head that copies for some tokens does on all others."""

from __future__ import annotations

import dataclasses

from plait.configs.domains import Name
from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

RELU = "model.mixers.relu_attention"


@SWEEPS.register("backcopy", source="Active-Dormant Attention Heads (2410.13835)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BackcopySweep(SweepConfig):
    """Losses of Bigram-Backcopy against those of Bayes, sinks, value drain and residual peak; with softmax and ReLU attention, Adam and SGD.

    Claimed by the authors: the loss of drawn tokens falls to the chain's own and that of copies to 0; queries that copy nothing attend to the
    first token, whose value drains and, in three layers, whose residual stream peaks; with ReLU attention or SGD there is none of these.
    SGD learns far more slowly, so that its rate is ten times the published one and it has more steps.

    Command: `python launch.py sweep backcopy --out sweeps/backcopy`. 18 runs.
    """

    preset: Name = "lm_sinks"
    """What the overrides of a row are of."""
    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        relu = {"model.pattern": "relu_attention", f"{RELU}.num_heads": 1, f"{RELU}.positions": "sinusoidal"}
        sgd = {"optimizer": "sgd", "optimizer.learning_rate": 0.3, "optimizer.weight_decay": 0.0, "steps": 1200}
        arms = chain(({},), (relu,), (sgd,))
        return product(each("probe.only", "default,sink_k_eps,sink_logit"), each("model.num_layers", 1, 3), arms)

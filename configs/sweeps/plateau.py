"""What happens on the plateau before a task is learned, and early in a language model."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product


@SWEEPS.register("plateau", source="What Happens During the Loss Plateau? (2506.13688)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlateauSweep(SweepConfig):
    """Loss, likeness of tokens and repeated predictions: one softmax layer on moving-window sums; softmax and a hybrid on text.

    Claimed: while the loss stands still, tokens before the head are nearly alike and the model repeats its outputs, and both end as the loss
    drops; language models show both in their first steps.

    Command: `python launch.py sweep plateau --out sweeps/plateau`. 9 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        told = {"probe.only": "representations", "checkpoint_every": None, "optimizer.schedule": "constant", "model.d_model": 64}
        sums = {
            "model.pattern": "softmax",
            "model.num_layers": 1,
            "model.mixers.softmax.num_heads": 1,
            "data.task": "moving_window",
            "data.task.val_rows": 256,
            "data.seq_len": 32,
            "data.batch_size": 64,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup_steps": 20,
            "steps": 600,
            "probe_every": 20,
            "eval_every": 20,
            "eval_batches": None,
        }
        text = {
            "model.num_layers": 4,
            "data.batch_size": 16,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup_steps": 50,
            "steps": 200,
            "probe_every": 5,
            "eval_every": 5,
            "eval_batches": 8,
        }
        texts = product((text,), each("model.pattern", "softmax", "gated_deltanet*3,softmax"))
        return product((told,), chain((sums,), texts))

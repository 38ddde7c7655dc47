"""Tasks that some mixers and shallow models never solve."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.hybrid import RECALL, THETA
from plait.configs.sweeps.rows import Rows, chain, each, product


@SWEEPS.register("glitches", source="Exposing Attention Glitches with Flip-Flop Language Modeling (2306.00946)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GlitchesSweep(SweepConfig):
    """Flip-flop glitches by mixer and by what regularises them; or induction (MQAR), by mixer and depth, with shifted keys and values.

    Claimed: recurrent models read the last bit without error, and attention glitches now and then, by seed, whatever regularises it
    (2306.00946); one layer cannot tell what followed a token unless its keys and values hold the token before
    (2411.19574). With other gaps: `python launch.py eval RUN --tasks flip_flop --flip-flop.ignore 0.98`.

    Command: `python launch.py sweep glitches --out sweeps/glitches`, 33 runs, and with `--on induction`, into another folder, 15 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""
    on: Literal["flip_flop", "induction"] = "flip_flop"
    """Which task."""

    def rows(self) -> Rows:
        if self.on == "induction":
            depths = [
                product((_one_head(name),), each("model.num_layers", *layers))
                for name, layers in (("softmax", (1, 2)), ("kv_shift", (1,)))
            ]
            retnet = product(({"model.pattern": "retnet"},), each("model.num_layers", 1, 2))
            return product(({**RECALL, "probe_every": 25, "eval_every": 25, "checkpoint_every": None},), chain(*depths, retnet))
        told = {"probe_every": 100, "eval_every": 100, "checkpoint_every": None, "data.task.val_rows": 512, "data.batch_size": 32}
        training = {"optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 50, "model.d_model": 64, **told}
        arms = chain(
            each("model.pattern", "softmax", "gla", "gated_deltanet"),
            ({"model.pattern": "hgrn2", "model.mixers.hgrn2.head_dim": 16},),
            product(
                each("model.pattern", "softmax"),
                chain(
                    each("optimizer.weight_decay", 0.0, 0.5),
                    each("model.mixers.softmax.qk_norm", True),
                    each("model.attention_loss.sharpness", 0.01, 0.1),
                    each("model.dropout.rate", 0.1, 0.3),
                ),
            ),
        )
        return product(({"data.task": "flip_flop", "data.seq_len": 128, "steps": 1000, **training},), arms)


def _one_head(name: str) -> dict[str, object]:
    """One attention head as wide as the model, with positions for short rows."""
    options = {"num_heads": 1, "head_dim": RECALL["model.d_model"], "positions.theta": THETA}
    return {"model.pattern": name, **{f"model.mixers.{name}.{key}": value for key, value in options.items()}}

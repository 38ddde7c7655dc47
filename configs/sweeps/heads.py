"""How many heads a token needs."""

from __future__ import annotations

import dataclasses

from plait.configs.sweeps.base import SWEEPS, Seeds, SweepConfig
from plait.configs.sweeps.rows import Rows, chain, each, product

MOH = "model.mixers.moh+softmax"


@SWEEPS.register("heads", source="MoH: Multi-Head Attention as Mixture-of-Head Attention (2410.11842)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsSweep(SweepConfig):
    """Loss by active heads: eight in use, Mixture-of-Head with 3, 4, 6 and 7 of 8, all but one mixed, fewer and wider ones; GLA too.

    Claimed: with 50 to 90% of the heads active, Mixture-of-Head is as good as multi-head attention or better. Four layers of width 64 on bytes
    of speeches. What each head is used for is in the reports of the runs (`head_load`).

    Command: `python launch.py sweep heads --out sweeps/heads`. 36 runs.
    """

    seeds: Seeds | None = 3
    """Runs of each row, with `seed` and `data.seed` from 0 on; None runs each once, with the preset's own."""

    def rows(self) -> Rows:
        eight = {f"{MOH}.mixer.num_heads": 8, f"{MOH}.mixer.head_dim": 8}
        of_softmax = tuple(
            {"model.pattern": "softmax", "model.mixers.softmax.num_heads": n, "model.mixers.softmax.head_dim": 64 // n}
            for n in (8, 4, 2)
        )
        moh = product(
            ({"model.pattern": "moh+softmax", f"{MOH}.num_shared_heads": 2, **eight},), each(f"{MOH}.top_k", 1, 2, 4, 5)
        )
        gla = {"model.mixers.moh+gla.mixer.num_heads": 8, "model.mixers.moh+gla.num_shared_heads": 2}
        arms = chain(
            of_softmax,
            ({"model.pattern": "softmax", "model.mixers.softmax.num_heads": 4, "model.mixers.softmax.head_dim": 8},),
            moh,
            ({"model.pattern": "moh+softmax", f"{MOH}.experts": "all_but_one", **eight},),
            ({"model.pattern": "gla", "model.mixers.gla.num_heads": 8},),
            product(({"model.pattern": "moh+gla", **gla},), each("model.mixers.moh+gla.top_k", 2, 4)),
        )
        told = {"steps": 300, "probe_every": 100, "eval_every": 100, "eval_batches": 16, "checkpoint_every": None}
        return product(({"model.num_layers": 4, "model.d_model": 64, **told},), arms)

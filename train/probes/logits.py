"""How large attention logits grow."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, Statistic, register


@register("logits", source="Small-scale proxies for large-scale Transformer training instabilities (2309.14322)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits(Probe):
    """The largest logit, of all queries."""

    statistics = (
        Statistic(
            name="max_logit",
            per="head",
            unit="before the softmax",
            meaning="largest attention logit of the probed sequences, all queries (softmax and sigmoid layers)",
            metric=("attn/max_logit", np.nanmax),
        ),
    )

    def measure(self, look, config):
        exact = look.observed.get("attention")
        if exact is None:
            return {}
        real = (look.at.segment_ids > 0)[:, :, None]
        return {"max_logit": jnp.where(real, exact.max_logit, -jnp.inf).max((0, 1))}

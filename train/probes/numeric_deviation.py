"""What low precision does to attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("numeric_deviation", source="Is Flash Attention Stable? (2405.02803), section 3, of the run's own inputs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericDeviation(Probe):
    """The layer's attention computed twice from its queries, keys and values, in bfloat16 and in float32."""

    by_default = False
    statistics = (
        Statistic(
            name="numeric_deviation",
            per="head",
            unit="|Δ| of head outputs",
            meaning="largest difference of a head's outputs in bfloat16 from those in float32 (softmax and sigmoid layers)",
            metric=Metric(name="attn/numeric_deviation", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(title="Error in bfloat16", section="Extreme values", lines=True, most=True, log=True),
        ),
    )

    def measure(self, look, config):
        if "attention" not in look.observed:
            return {}
        cast = lambda x, dtype: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        def heads(dtype: Any) -> jax.Array:
            inputs = jax.tree.map(lambda x: cast(x, dtype), look.inputs)
            return look.mixer.attend(inputs, at=look.at, state=None)[0].astype(jnp.float32)

        return {"numeric_deviation": jnp.abs(heads(jnp.bfloat16) - heads(jnp.float32)).max((0, 1, 3))}  # padding gives zeros

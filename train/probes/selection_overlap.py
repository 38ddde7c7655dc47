"""Whether layers choose the same."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.train.probes.base import Probe, register
from plait.train.probes.means import mean_of_rows, upto
from plait.train.probes.selection import SECTION, chosen, leaves_out, told
from plait.train.probes.statistic import Metric, Panel, Statistic


@register("selection_overlap", source="plait's own; what layers could share of a selection")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionOverlap(Probe):
    """The tokens that the queries of a layer choose beside those of the layer before that chooses, of rows that leave tokens out in both."""

    by_default = False
    statistics = (
        Statistic(
            name="selection_layer_overlap",
            per="layer",
            unit="share",
            meaning="chosen tokens in common over those of either, of a layer and the one before it that chooses; a token counts by the share "
            "of heads that choose it",
            metric=Metric(name="selection/layer_overlap", reduce=np.nanmean, meaning="mean over layers"),
            panel=Panel(title="Overlap with the layer before", section=SECTION, lines=True, limits=(0, 1)),
        ),
    )

    def measure(self, look, config):
        return {}

    def parts(self, looks, config):
        tell = [(look, selection) for look in looks if (selection := told(look)) is not None]
        if not tell:
            return {}
        every = [chosen(look, selection) for look, selection in tell]
        past = upto(tell[0][0])
        share = jnp.concatenate([seen.astype(jnp.float32).mean(1, keepdims=True) for seen in every], axis=1).mean(1)
        return {"share": share, "rows": jnp.stack([leaves_out(seen, past) for seen in every]).any(0)}

    def across(self, layers, config):
        found: list[dict[str, jax.Array]] = []
        before = None
        for part in layers:
            found.append({})
            if not part:
                continue
            if before is not None:
                rows = part["rows"] & before["rows"]
                both, either = (f(part["share"], before["share"]).sum(-1) for f in (jnp.minimum, jnp.maximum))
                ratio = both / jnp.maximum(either, 1e-30)
                found[-1]["selection_layer_overlap"] = mean_of_rows(ratio[:, None], rows)[0]
            before = part
        return found

"""How broad attention is, and whether it collapsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from plait.train.probes import sinks
from plait.train.probes.base import Probe, register
from plait.train.probes.means import masked_mean, weights
from plait.train.probes.statistic import Metric, Panel, Statistic, Threshold, Trend
from plait.train.probes.thresholds import heads_of, mean
from plait.train.probes.words import count
from plait.train.watching.spikes import LossSpikes
from plait.train.watching.watchers import Event, Values, Watcher

THRESHOLD = 0.05
"""Share of log n below which the entropy of a head counts as collapsed."""


def _of_a_sink(values: Values, layer: int, head: int | None) -> str:
    sink = "sink" in values and sinks.is_sink(values["sink"][layer, head, 0])
    return " (it is a sink: the weight sits on the first token)" if sink else ""


@register("entropy", source="sigmaReparam (2303.06296), section 2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy(Probe):
    """Entropy of query rows: exact and of every row where the mixer tells it, of the looked-at rows of implied attention elsewhere."""

    statistics = (
        Statistic(
            name="entropy_ratio",
            per="head",
            unit="share of log n",
            meaning="entropy over log n, n the document's tokens up to the query, mean over queries that see two or more: 1 looks "
            "everywhere alike, 0 at one token",
            metric=Metric(name="attn/entropy_ratio", reduce=np.nanmean, meaning="mean over heads and layers"),
            panel=Panel(
                title="Entropy / log n",
                section="Attention over training",
                trends=(Trend(title="Mean entropy", unit="share of log n", reduce=np.mean),),
                map=True,
                limits=(0, 1),
                low_is_dark=True,
                column=("entropy", lambda ratio: f"{np.nanmean(ratio):.2f}"),
            ),
            event=Threshold(
                kind="entropy_collapse",
                limits=(THRESHOLD,),
                below=True,
                heads="attention",
                meaning="the entropy ratio of a head that attends falls below the limit. One that reads a state and forgets within a "
                "token or two has low entropy by design; its decay horizon says so",
                message="the entropy of {where} fell to {value:.3f} of log n",
                start_kind="low_entropy_at_start",
                start_message="the entropy of {where} is since the first probe {value:.3f} of log n",
                note=_of_a_sink,
            ),
        ),
        Statistic(
            name="entropy",
            per="head",
            unit="nats",
            meaning="mean over queries",
            metric=Metric(name="attn/entropy_mean", reduce=np.nanmean, meaning="mean over heads and layers"),
        ),
    )

    def measure(self, look, config):
        segment_ids, positions = look.at.segment_ids, look.at.positions
        if (exact := look.observed.get("attention")) is not None:
            entropy, axes = exact.entropy, (0, 1)  # [B, T, H]
            real, position = (segment_ids > 0)[:, :, None], positions[:, :, None]
        elif look.implied is not None:
            a, axes = weights(look.implied), (0, 2)
            entropy = -(a * jnp.log(a + 1e-6)).sum(-1)  # [B, H, R]
            real, position = (segment_ids[:, look.rows] > 0)[:, None, :], positions[:, look.rows][:, None, :]
        else:
            return {}
        ratio = entropy / jnp.log(jnp.maximum(position, 1).astype(jnp.float32) + 1.0)
        return {
            "entropy": masked_mean(entropy, real, axis=axes),
            "entropy_ratio": masked_mean(ratio, real & (position > 0), axis=axes),
        }

    def watchers(self, layers):
        return [*super().watchers(layers), ModelCollapse(layers)]

    def summary(self, run):
        ratio = run.by_head("entropy_ratio")
        if ratio is None:
            return None
        went = [
            f"{np.nanmean(part[0]):.2f} to {np.nanmean(part[-1]):.2f} in {group.words}"
            for group, part in run.by_group("entropy_ratio").items()
            if np.isfinite(part[0]).any() and np.isfinite(part[-1]).any()
        ]
        if not went:
            return None
        text = "Mean entropy, as a share of log n, went from " + ", ".join(went)
        layer, head = np.unravel_index(np.nanargmin(ratio[-1]), ratio[-1].shape)
        text += f"; the sharpest head at the end is layer {layer} head {head} ({ratio[-1, layer, head]:.2f})"
        collapsed = sum(event["layer"] is not None for event in run.events_of("entropy_collapse"))
        text += f"; {count(collapsed, 'head')} collapsed" if collapsed else "; no head collapsed"
        whole = run.events_of(ModelCollapse.kind)
        return text + ("; the whole model did, together with a loss spike." if whole else ".")


class ModelCollapse(Watcher):
    """Low entropy of the whole model soon after a loss spike, reported once."""

    name = "entropy_collapse"
    kind = "model_entropy_collapse"
    steps = 200
    """Most steps since the spike."""

    def __init__(self, layers: Sequence[Mapping[str, Any]] = ()):
        self.layers = layers
        self.losses = LossSpikes()
        self.fired = False
        self.limits = {self.kind: (0.1,), **self.losses.limits}
        self.bounded = {self.kind: (0.0, 1.0)}
        self.kinds = {
            self.kind: "the mean ratio of the model's heads that attend (of all where none does) is below the limit, within "
            f"{self.steps} steps after a `{LossSpikes.name}`"
        }

    def update(self, step: int, values: Values) -> list[Event]:
        self.losses.limits = {LossSpikes.name: self.limits[LossSpikes.name]}
        self.losses.update(step, values)
        spike = self.losses.last
        if "entropy_ratio" not in values or spike is None or step - spike > self.steps or self.fired:
            return []
        ratio = np.asarray(values["entropy_ratio"], np.float64)
        attend = heads_of(self.layers, "attention", ratio.shape)
        value = mean(np.where(attend | ~attend.any(), ratio, np.nan))
        (limit,) = self.limits[self.kind]
        if not value < limit:
            return []
        self.fired = True
        text = f"entropy collapse: the mean entropy is {value:.3f} of log n, with a loss spike at step {spike}"
        return [Event(step, self.kind, None, None, value, limit, text)]

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses.state_dict(), "fired": self.fired}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.fired = state["fired"]

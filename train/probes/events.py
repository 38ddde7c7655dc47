"""What happened to attention during a run: sinks, entropy collapse, growing logits, massive activations, loss spikes.

A detector is fed in step order and reports each thing once. Sinks and entropy follow "When attention sink emerges" (2410.10781)
and sigmaReparam (2303.06296); massive activations 2402.17762. What holds already at the first probe did not *emerge*: it gets
its own kind (`sink_at_start`, `low_entropy_at_start`) and, only after it has clearly gone, may be reported as an onset later.
That matters for linear layers, whose implied attention may favour the first token at initialisation.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation


@dataclass(frozen=True, kw_only=True)
class EventThresholds:
    """Where each detector fires."""

    sink: float = 0.3
    """alpha_1, the mean weight a head gives the first token, above which the head is a sink."""
    model_sink_rate: float = 0.1
    """Mean over heads of the share of sequences with a sink, above which the model has sinks."""
    entropy: float = 0.05
    """Share of log(visible keys) below which the entropy of a head counts as collapsed."""
    model_entropy: float = 0.1
    """The same for the mean over softmax heads (over all heads when there are none), joined with a loss spike."""
    join_steps: int = 200
    """Most steps between a loss spike and low entropy for the two to be one model-level collapse."""
    logits: tuple[float, ...] = (50.0, 1e2, 1e3, 1e4)
    """Largest attention logit of a layer, each reported once."""
    activation: float = 100.0
    """|x| in the residual stream that may be massive,"""
    activation_ratio: float = 1000.0
    """when it is also this many times the median |x|."""
    spike_sigma: float = 6.0
    """A loss spike lies this many robust standard deviations above the median of recent losses,"""
    spike_rise: float = 0.1
    """and at least this share of that median."""
    spike_history: int = 32
    """How many recent losses are kept; a quarter of them must be there before the first spike."""
    release: float = 0.8
    """Share of the threshold a head must fall below before what held at the start may be reported as an onset."""


@dataclass(frozen=True)
class Event:
    """One thing that happened; `layer` or `head` is None where it concerns the whole model or layer."""

    step: int
    kind: str
    layer: int | None
    head: int | None
    value: float
    threshold: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The line of `events.jsonl`."""
        return dataclasses.asdict(self)


class EventDetector:
    """Finds events in a stream of probes and losses; its whole memory is the small dict of `state_dict`.

    Args:
      layers: the entries of `probes/layers.json`; without them every layer is named by its index and counted as softmax.
      thresholds: where each detector fires.
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]] = (), thresholds: EventThresholds | None = None):
        self.thresholds = thresholds or EventThresholds()
        self.layers = list(layers)
        self._first_probe: int | None = None
        self._fired: set[str] = set()
        self._held: set[str] = set()  # true at the first probe and not gone since
        self._losses: deque[float] = deque(maxlen=self.thresholds.spike_history)
        self._spiking = False
        self._last_spike: int | None = None

    def update(self, step: int, probes: Mapping[str, np.ndarray] | None = None, loss: float | None = None) -> list[Event]:
        """Events of this step; `probes` as in `probes/step_*.npz` (None between probes), `loss` the train loss if known."""
        found = [] if loss is None else self._loss_spike(step, float(loss))
        if probes:
            first = self._first_probe is None
            self._first_probe = step if first else self._first_probe
            arrays = {name: np.asarray(value, np.float64) for name, value in probes.items()}
            for detect in (self._sinks, self._entropy, self._logits, self._activations):
                found += detect(step, arrays, first)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything the next `update` depends on, as JSON."""
        return {
            "first_probe": self._first_probe,
            "fired": sorted(self._fired),
            "held": sorted(self._held),
            "losses": list(self._losses),
            "spiking": self._spiking,
            "last_spike": self._last_spike,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken: no event is repeated and none is lost."""
        self._first_probe, self._spiking, self._last_spike = state["first_probe"], state["spiking"], state["last_spike"]
        self._fired, self._held = set(state["fired"]), set(state["held"])
        self._losses = deque(state["losses"], maxlen=self.thresholds.spike_history)

    # Each detector below returns the events of one kind at one step.

    def _loss_spike(self, step: int, loss: float) -> list[Event]:
        limits, history = self.thresholds, np.asarray(self._losses)
        bound, median = math.inf, math.nan
        if 4 * len(history) >= limits.spike_history:
            median = float(np.median(history))
            spread = MAD_TO_SIGMA * float(np.median(np.abs(history - median)))
            bound = median + max(limits.spike_sigma * spread, limits.spike_rise * abs(median))
        spiking = not loss <= bound if math.isfinite(loss) else True
        starts, self._spiking = spiking and not self._spiking, spiking
        if math.isfinite(loss):
            self._losses.append(loss)
        if spiking:
            self._last_spike = step
        if not starts:
            return []
        usual = f"; the last {len(history)} losses have the median {median:.3f}" if math.isfinite(median) else ""
        text = f"loss {loss:.3f}{usual}" if math.isfinite(loss) else f"the loss is not finite{usual}"
        return [Event(step, "loss_spike", None, None, loss, bound, text)]

    def _sinks(self, step: int, probes: Mapping[str, np.ndarray], first: bool) -> list[Event]:
        if "sink" not in probes:
            return []
        alpha, limits, found = probes["sink"][..., 0], self.thresholds, []
        above, gone = alpha > limits.sink, alpha < limits.release * limits.sink
        for layer, head in np.ndindex(alpha.shape):
            emerged = self._onset(f"sink/{layer}/{head}", bool(above[layer, head]), bool(gone[layer, head]), first)
            if emerged is not None:
                value, where = float(alpha[layer, head]), self._name(layer, head)
                share = f"{value:.2f} of its attention {'goes' if emerged else 'went'} to the first token"
                text = f"{where} became a sink: {share}" if emerged else f"{where} is a sink since the first probe: {share}"
                kind = "sink_onset" if emerged else "sink_at_start"
                found.append(Event(step, kind, layer, head, value, limits.sink, text))
        rates = probes.get("sink_rate", np.where(np.isnan(alpha), np.nan, above))
        rate = _mean(rates)
        emerged = self._onset("sink/model", rate > limits.model_sink_rate, rate < limits.release * limits.model_sink_rate, first)
        if emerged is not None:
            text = f"{rate:.0%} of (head, sequence) pairs have a sink" + ("" if emerged else ", already at the first probe")
            kind = "sink_onset" if emerged else "sink_at_start"
            found.append(Event(step, kind, None, None, rate, limits.model_sink_rate, text))
        return found

    def _entropy(self, step: int, probes: Mapping[str, np.ndarray], first: bool) -> list[Event]:
        if "entropy_ratio" not in probes:
            return []
        ratio, limits, found = probes["entropy_ratio"], self.thresholds, []
        # A linear head that forgets within a token or two has low entropy by design; its decay horizon says so better.
        linear = np.array([i < len(self.layers) and self.layers[i].get("kind") == "linear" for i in range(len(ratio))])
        below, gone = (ratio < limits.entropy) & ~linear[:, None], ratio > limits.entropy / limits.release
        for layer, head in np.ndindex(ratio.shape):
            emerged = self._onset(f"entropy/{layer}/{head}", bool(below[layer, head]), bool(gone[layer, head]), first)
            if emerged is not None:
                value, where = float(ratio[layer, head]), self._name(layer, head)
                when = "fell to" if emerged else "is since the first probe"
                text = f"the entropy of {where} {when} {value:.3f} of log n"
                if "sink" in probes and probes["sink"][layer, head, 0] > limits.sink:
                    text += " (it is a sink: the weight sits on the first token)"
                kind = "entropy_collapse" if emerged else "low_entropy_at_start"
                found.append(Event(step, kind, layer, head, value, limits.entropy, text))
        mean = _mean(ratio[~linear] if not linear.all() else ratio)
        near = self._last_spike is not None and step - self._last_spike <= limits.join_steps
        if mean < limits.model_entropy and near and self._once("entropy/model"):
            text = f"entropy collapse: the mean entropy is {mean:.3f} of log n, with a loss spike at step {self._last_spike}"
            found.append(Event(step, "entropy_collapse", None, None, mean, limits.model_entropy, text))
        return found

    def _logits(self, step: int, probes: Mapping[str, np.ndarray], first: bool) -> list[Event]:
        found = []
        for layer, heads in enumerate(probes.get("max_logit", ())):
            if np.isnan(heads).all():
                continue
            head = int(np.nanargmax(heads))
            for threshold in self.thresholds.logits:
                if heads[head] > threshold and self._once(f"logit/{layer}/{threshold:g}"):
                    value, where, when = (
                        float(heads[head]),
                        self._name(layer, head),
                        ", already at the first probe" if first else "",
                    )
                    text = f"the largest attention logit of {where} is {value:.3g}, above {threshold:g}{when}"
                    found.append(Event(step, "logit_growth", layer, head, value, threshold, text))
        return found

    def _activations(self, step: int, probes: Mapping[str, np.ndarray], first: bool) -> list[Event]:
        if not {"residual_top", "residual_median"} <= probes.keys():
            return []
        limits, found = self.thresholds, []
        for layer, (top, median) in enumerate(zip(probes["residual_top"][:, 0], probes["residual_median"])):
            massive = top > limits.activation and top > limits.activation_ratio * median
            if massive and self._once(f"activation/{layer}"):
                times = f"{top / median:,.0f} times the median" if median > 0 else "with a median of 0"
                when = ", already at the first probe" if first else ""
                text = f"massive activation after layer {layer}: |x| reaches {top:,.0f}, {times}{when}"
                found.append(Event(step, "massive_activation", layer, None, float(top), limits.activation, text))
        return found

    def _onset(self, key: str, holds: bool, gone: bool, first: bool) -> bool | None:
        """True where a condition emerges now, False where it held from the first probe on, None where there is nothing to say."""
        if holds and first:
            self._held.add(key)
            return False
        if gone:
            self._held.discard(key)
        return True if holds and key not in self._held and self._once(key) else None

    def _once(self, key: str) -> bool:
        new = key not in self._fired
        self._fired.add(key)
        return new

    def _name(self, layer: int, head: int) -> str:
        mixer = f" ({self.layers[layer]['mixer']})" if layer < len(self.layers) else ""
        return f"layer {layer}{mixer} head {head}"


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan

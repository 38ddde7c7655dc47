"""What happened in a run, in plain sentences made from its numbers."""

import math
from collections.abc import Sequence

import numpy as np

from plait.train.report.run import Run, facts, final_loss, flatten, number, quantity

SINK = 0.3


def summary(run: Run) -> dict[str, str]:
    """A sentence or two for each topic the data tells of: loss, stability, sinks, entropy, memory, head load, extremes, speed."""
    topics = {
        "Loss": _loss,
        "Stability": _stability,
        "Sinks": _sinks,
        "Entropy": _entropy,
        "Memory": _memory,
        "Head load": _load,
        "Extremes": _extremes,
        "Speed": _speed,
    }
    return {topic: sentence[0].upper() + sentence[1:] for topic, tell in topics.items() if (sentence := tell(run))}


def _loss(run: Run) -> str | None:
    steps, values = run.series("loss/train")
    finite = np.isfinite(values)
    if not finite.any():
        return "No finite training loss was logged."
    steps, values = steps[finite], values[finite]
    if steps.size == 1:
        return f"One training loss was logged: {values[0]:.3f} at step {steps[0]:,}."
    text = f"Training loss went from {values[0]:.2f} to {final_loss(run):.3f} over {int(steps[-1]):,} steps"
    tokens = run.records[-1].get("tokens", math.nan)
    text += f" ({quantity(tokens)} tokens)." if math.isfinite(tokens) else "."
    val_steps, val = run.series("loss/val")
    if np.isfinite(val).any():
        best = int(np.nanargmin(val))
        bits = run.last("loss/bits_per_byte")
        text += f" Validation ended at {run.last('loss/val'):.3f}" + (
            f", {bits:.3f} bits per byte" if math.isfinite(bits) else ""
        )
        last = best == len(val) - 1
        text += ", its lowest." if last else f"; its lowest was {val[best]:.3f} at step {int(val_steps[best]):,}."
    return text


def _stability(run: Run) -> str | None:
    spikes = _events(run, "loss_spike")
    broken = int((~np.isfinite(run.series("loss/train")[1])).sum())
    parts = []
    if spikes:
        parts.append(f"{_count(len(spikes), 'loss spike')}, at {_steps([event['step'] for event in spikes])}")
    if broken:
        parts.append(f"{_count(broken, 'logged loss', 'logged losses')} not finite")
    if any(event["layer"] is None for event in _events(run, "entropy_collapse")):
        parts.append("entropy collapse of the whole model together with a loss spike")
    return "; ".join(parts) + "." if parts else None


def _sinks(run: Run) -> str | None:
    sink = run.probe("sink")
    if sink is None:
        return None
    sentences = []
    onsets = [event for event in _events(run, "sink_onset") if event["layer"] is not None]
    for kind in run.kinds:
        layers = run.layers_of(kind)
        last = sink[-1, layers]
        heads, now = int(np.isfinite(last).sum()), int((last > SINK).sum())
        if not heads:
            continue
        mine = [event for event in onsets if event["layer"] in layers]
        early = [event for event in _events(run, "sink_at_start") if event["layer"] in layers]
        text = f"{now} of {_count(heads, 'head')} of the {kind} layers {'is a sink' if now == 1 else 'are sinks'} at the end"
        if mine:
            first = mine[0]
            text += f"; the first onset was layer {first['layer']} head {first['head']} at step {first['step']:,}"
            text += f", the last of {len(mine)} at step {mine[-1]['step']:,}" if len(mine) > 1 else ""
        if early:
            text += f"; {len(early)} had α₁ > {SINK} from the first probe on, which is no emergence"
        if now:
            layer, head = np.unravel_index(np.nanargmax(last), last.shape)
            text += f"; strongest is layer {layers[layer]} head {head} with α₁ = {last[layer, head]:.2f}"
        sentences.append(text + ".")
    return " ".join(sentences) or None


def _entropy(run: Run) -> str | None:
    ratio = run.probe("entropy_ratio")
    if ratio is None:
        return None
    parts = []
    for kind in run.kinds:
        of_kind = ratio[:, run.layers_of(kind)]
        if np.isfinite(of_kind[[0, -1]]).any((1, 2)).all():
            parts.append(f"{np.nanmean(of_kind[0]):.2f} to {np.nanmean(of_kind[-1]):.2f} in {kind} layers")
    if not parts:
        return None
    text = "Mean entropy, as a share of log n, went from " + ", ".join(parts)
    if np.isfinite(ratio[-1]).any():
        layer, head = np.unravel_index(np.nanargmin(ratio[-1]), ratio[-1].shape)
        text += f"; the sharpest head at the end is layer {layer} head {head} ({ratio[-1, layer, head]:.2f})"
    collapsed = [event for event in _events(run, "entropy_collapse") if event["layer"] is not None]
    return text + (f"; {_count(len(collapsed), 'head')} collapsed." if collapsed else "; no head collapsed.")


def _memory(run: Run) -> str | None:
    horizon = run.probe("decay_horizon")
    if horizon is None or not np.isfinite(horizon[-1]).any():
        return None
    low, middle, high = np.nanpercentile(horizon[-1], (0, 50, 100))
    return f"linear heads forget over {low:.3g} to {high:.3g} tokens at the end, {middle:.3g} in the median."


def _load(run: Run) -> str | None:
    load = run.probe("head_load")
    if load is None or not np.isfinite(load[-1]).any():
        return None
    last = load[-1]
    idle = int((last < 0.02).sum())
    text = f"heads are chosen by {np.nanmin(last):.0%} to {np.nanmax(last):.0%} of the tokens"
    return text + (f"; {_count(idle, 'head')} by fewer than 2%." if idle else "; none is idle.")


def _extremes(run: Run) -> str | None:
    parts = []
    logits, top, median = run.probe("max_logit"), run.probe("residual_top"), run.probes.arrays.get("residual_median")
    if logits is not None:
        parts.append(f"the largest attention logit seen is {np.nanmax(logits):.3g}")
    if top is not None and median is not None and np.isfinite(top[-1, :, 0]).any():
        layer = int(np.nanargmax(top[-1, :, 0]))
        times = top[-1, layer, 0] / median[-1, layer] if median[-1, layer] > 0 else math.inf
        text = f"the largest |x| at the end is {top[-1, layer, 0]:,.3g} after layer {layer}, {times:,.0f} times the median"
        massive = [event["layer"] for event in _events(run, "massive_activation")]
        parts.append(text + (f"; massive activations in layers {_ranges(massive)}" if massive else "; no massive activations"))
    return "; ".join(parts) + "." if parts else None


def _speed(run: Run) -> str | None:
    told = facts(run)
    if told["speed"] == "–":
        return None
    mfu = f" at {told['MFU']} of the peak FLOP rate" if told["MFU"] != "–" else ""
    return f"{told['speed']} in the median{mfu}; {told['wall time']} in all."


def comparison(runs: Sequence[Run]) -> dict[str, str]:
    """What sets the runs apart: the lowest validation loss (training loss where no run has one), and the fastest run."""
    told = {}
    name = next((n for n in ("loss/val", "loss/train") if sum(math.isfinite(run.last(n)) for run in runs) > 1), None)
    if name:
        ranked = sorted((run.last(name), run.name) for run in runs if math.isfinite(run.last(name)))
        which = "validation" if name == "loss/val" else "training"
        (best, winner), (second, _), (worst, loser) = ranked[0], ranked[1], ranked[-1]
        text = f"{winner} has the lowest {which} loss, {best:.3f}, {second - best:.3f} below the next"
        told["Loss"] = text + (f" and {worst - best:.3f} below the last, {loser}." if len(ranked) > 2 else f", {loser}.")
    ends = {run.records[-1].get("tokens") for run in runs if run.records}
    if len(ends) > 1:
        told["Tokens"] = "The runs did not see the same number of tokens; compare their losses at equal steps, in the curves."
    return told


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The config fields whose values differ between the runs, with the value of each run; a dash where a run lacks it."""
    flat = [{name: str(value) for name, value in flatten(run.config).items()} for run in runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = {name: [fields.get(name, "–") for fields in flat] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1 and name.split(".")[-1] not in ("out", "resume")}


def sink_count(run: Run) -> str:
    """How many heads are sinks at the last probe, as n/all."""
    sink = run.probe("sink")
    return "–" if sink is None else f"{int((sink[-1] > SINK).sum())}/{int(np.isfinite(sink[-1]).sum())}"


def mean_entropy(run: Run) -> str:
    """The mean entropy ratio over all heads at the last probe."""
    ratio = run.probe("entropy_ratio")
    return "–" if ratio is None or not np.isfinite(ratio[-1]).any() else number(float(np.nanmean(ratio[-1])), 2)


def _events(run: Run, kind: str) -> list[dict]:
    return sorted((event for event in run.events if event["kind"] == kind), key=lambda event: event["step"])


def _count(number_of: int, one: str, many: str | None = None) -> str:
    return f"{number_of} {one if number_of == 1 else many or one + 's'}"


def _ranges(items: Sequence[int]) -> str:
    """Whole numbers with neighbours joined: 0, 3-7."""
    ordered = sorted(set(items))
    starts = [item for item in ordered if item - 1 not in ordered]
    ends = [item for item in ordered if item + 1 not in ordered]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends))


def _steps(steps: Sequence[int], limit: int = 6) -> str:
    listed = ", ".join(f"{step:,}" for step in steps[:limit])
    return f"step{'s' if len(steps) > 1 else ''} {listed}" + (f" and {len(steps) - limit} more" if len(steps) > limit else "")

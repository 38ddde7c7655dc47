"""What happened in a run, in plain sentences made from its numbers."""

import math
from collections.abc import Sequence

import numpy as np

from plait.train.probes.base import chosen, statistics
from plait.train.probes.words import count
from plait.train.report.run import Run, facts, final_loss, flatten, quantity
from plait.train.watching.spikes import LossSpikes


def summary(run: Run) -> dict[str, str]:
    """A sentence or two for each topic the data tells of: loss, stability, what each probe says, speed."""
    tellers = {"Loss": _loss, "Stability": _stability}
    tellers |= {probe.topic(): probe.summary for probe in chosen()}
    tellers["Speed"] = _speed
    return {topic: sentence[0].upper() + sentence[1:] for topic, tell in tellers.items() if (sentence := tell(run))}


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
    spikes = run.events_of(LossSpikes.name)
    broken = int((~np.isfinite(run.series("loss/train")[1])).sum())
    parts = []
    if spikes:
        parts.append(f"{count(len(spikes), 'loss spike')}, at {_steps([event['step'] for event in spikes])}")
    if broken:
        parts.append(f"{count(broken, 'logged loss', 'logged losses')} not finite")
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


def columns(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By heading, what the table of a comparison says of each run's statistics at the end; a dash where it has no value."""
    found = {}
    for name, one in statistics().items():
        if one.panel is not None and one.panel.column is not None:
            heading, text = one.panel.column
            ends = [None if (values := run.by_head(name)) is None else values[-1] for run in runs]
            found[heading] = ["–" if end is None or not np.isfinite(end).any() else text(end) for end in ends]
    return found


def _steps(steps: Sequence[int], limit: int = 6) -> str:
    listed = ", ".join(f"{step:,}" for step in steps[:limit])
    return f"step{'s' if len(steps) > 1 else ''} {listed}" + (f" and {len(steps) - limit} more" if len(steps) > limit else "")

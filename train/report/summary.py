"""What happened in a run, in plain sentences made from its numbers."""

import math
from collections.abc import Sequence

import numpy as np

from plait.train.probes.base import chosen, statistics
from plait.train.probes.words import count
from plait.train.report.run import Run, facts, final_loss, quantity
from plait.train.scoring.extent import words as extent
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
        measured = extent(run.environment)
        text += f", on {measured}" if measured else ""
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


def columns(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By heading, what the table of a comparison says of each run's statistics at the end, for each kind of head apart where there are
    several; a dash where it has no value."""
    found: dict[str, list[str]] = {}
    for name, one in statistics().items():
        if one.panel is None or one.panel.column is None:
            continue
        heading, text = one.panel.column
        ends = [{group.words: values[-1] for group, values in run.by_group(name).items()} for run in runs]
        kinds = dict.fromkeys(words for end in ends for words in end)
        for words in kinds:
            title = f"{heading}, {words}" if len(kinds) > 1 else heading
            found[title] = [text(end[words]) if words in end and np.isfinite(end[words]).any() else "–" for end in ends]
    return found


def _steps(steps: Sequence[int], limit: int = 6) -> str:
    listed = ", ".join(f"{step:,}" for step in steps[:limit])
    return f"step{'s' if len(steps) > 1 else ''} {listed}" + (f" and {len(steps) - limit} more" if len(steps) > limit else "")

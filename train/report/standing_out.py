"""What stands out in a checkpoint, from the events that thresholds make of one look at it: a line for each kind of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.train.probes.words import ranges
from plait.train.report.page import table
from plait.train.report.panels.curves import event_title
from plait.train.report.run import Run

_WORDS = {"logit_growth": "large attention logits", "entropy_collapse": "low entropy", "low_entropy_at_start": "low entropy"}
"""Kinds whose names tell of a change in training, which a checkpoint alone cannot show."""


def standing_out(runs: Sequence[Run]) -> str:
    """A table by model and kind: how many heads or layers, in which layers, and the largest value; empty where there is nothing."""
    rows = []
    for run in runs:
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for event in run.events:
            kinds.setdefault(event["kind"], []).append(event)
        rows += [[run.name, *_line(kind, events)] for kind, events in kinds.items()]
    if not rows:
        return ""
    if len(runs) == 1:
        return table(["what", "where", "how much"], [row[1:] for row in rows])
    return table(["model", "what", "where", "how much"], rows)


def _line(kind: str, events: Sequence[Mapping[str, Any]]) -> list[str]:
    """What, where, and the furthest value with the limit that it is beyond."""
    places = {(event["layer"], event["head"]) for event in events}
    layers = sorted({layer for layer, _ in places if layer is not None})
    heads = sum(head is not None for _, head in places)
    where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)}" if layers else "the model"
    where += f", {heads} head{'s' * (heads > 1)}" if heads else ""
    below = events[0]["value"] < events[0]["threshold"]
    furthest = (min if below else max)(events, key=lambda event: (event["value"], event["threshold"]))
    of = "" if furthest["layer"] is None else f" in layer {furthest['layer']}"
    of += "" if furthest["head"] is None else f" head {furthest['head']}"
    most = f"{'smallest' if below else 'largest'} " if len(places) > 1 else ""
    limit = f"{'below' if below else 'above'} {_number(furthest['threshold'])}"
    return [_title(kind), where, f"{most}{_number(furthest['value'])}{of} ({limit})"]


def _title(kind: str) -> str:
    return _WORDS.get(kind) or event_title(kind.removesuffix("_at_start").removesuffix("_onset"))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

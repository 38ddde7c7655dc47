"""Heads that are named, and those that are left out."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from plait.models.config import LMConfig
from plait.models.mixers.base import abstract
from plait.train.inspection.looking import Kept, num_heads

Head = tuple[int, int]
"""Layer and head, from 0."""


class InspectError(ValueError):
    """What cannot be inspected as asked."""


@dataclasses.dataclass(frozen=True)
class Masking:
    """A model without some heads."""

    name: str
    """As the report calls it."""
    heads: tuple[Head, ...] = ()

    def kept(self, model: LMConfig) -> Kept:
        """All others."""
        kept = [np.ones(count, bool) for count in num_heads(model)]
        for layer, head in self.heads:
            kept[layer][head] = False
        return kept


def named_heads(option: str, text: str, model: LMConfig, others: Sequence[str] = ()) -> tuple[Head, ...]:
    """The heads of `L.H,L.H`. Raises InspectError for what names none of the model; `others` are words that the option knows besides."""
    counts = num_heads(model)
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word in others:
            raise InspectError(f"{option}={text!r}: {word!r} stands alone; leave the others out, or name heads as 3.1,12.0 alone")
        if not re.fullmatch(r"[0-9]{1,18}\.[0-9]{1,18}", word):
            near = difflib.get_close_matches(word.lower(), others, 1)
            fix = f"did you mean {near[0]!r}?" if near else "write LAYER.HEAD, both from 0, as 3.1,12.0"
            raise InspectError(f"{option}={text!r}: {word!r} is no head; {fix}")
        layer, head = map(int, word.split("."))
        if layer >= len(counts):
            raise InspectError(f"{option}={text!r}: {word} is in layer {layer}, and the layers are 0 to {len(counts) - 1}")
        if head >= counts[layer]:
            raise InspectError(
                f"{option}={text!r}: {word} is head {head}, and layer {layer} ({model.layers[layer]}) has the heads 0 to {counts[layer] - 1}"
            )
        found.append((layer, head))
    if not found:
        raise InspectError(f"{option}={text!r} names no head; write LAYER.HEAD, both from 0, as 3.1,12.0")
    return tuple(dict.fromkeys(found))


def maskable(model: LMConfig) -> list[Head]:
    """The heads that have an output of their own before the projection, and so can be left out."""
    of_layers = [abstract(mixer, model.d_model).projected for mixer in model.layer_mixers]
    return [(layer, head) for layer, own in enumerate(of_layers) for head, has in enumerate(own) if has]


def check_maskable(option: str, asked: str, heads: Iterable[Head], model: LMConfig) -> None:
    """Raises InspectError where one of them cannot be left out."""
    there = set(maskable(model))
    for layer, head in heads:
        if (layer, head) not in there:
            raise InspectError(
                f"{option}={asked!r}: layer {layer} ({model.layers[layer]}) has no heads before an output projection, so none of its can be "
                f"left out; use heads of {_layers_of(there) or 'another model'}"
            )


def _layers_of(heads: Iterable[Head]) -> str:
    layers = sorted({layer for layer, _ in heads})
    return f"layers {', '.join(map(str, layers))}" if layers else ""


def drawn(rng: np.random.Generator, among: Iterable[Head], count: int) -> tuple[Head, ...]:
    """So many heads at random, in their order."""
    among = list(among)
    return tuple(among[i] for i in sorted(rng.choice(len(among), count, replace=False)))

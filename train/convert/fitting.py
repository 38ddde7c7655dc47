"""What of a folder goes where in a model, before a weight is read."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from plait.configs.domains import DEPTH, shown
from plait.models.config import LMConfig
from plait.models.hf.base import MODEL_TYPES, Family, Line, Unfit
from plait.models.hf.places import Place
from plait.models.hf.transforms import Shape
from plait.models.hf.values import Values
from plait.models.hf.waiting import WAITING
from plait.models.lm import learned_shapes
from plait.train.convert.reading import CONFIG, Reader, reader_of
from plait.train.convert.weights import DTYPES, ConvertError, Weights

_MOST = 8
"""Names that an error lists."""
_LONGEST = 64
"""Characters of a model type."""

Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""Of what a model learns, by dotted path."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A published model: a folder, or a GGUF file."""

    folder: Path
    """Or the file."""
    reader: Reader
    fields: Mapping[str, Any]
    """Of its `config.json`, those of the language model."""
    family: Family
    model: LMConfig

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Raises ConvertError: no config, an unknown model type, or one that asks for what there is not here."""
        reader = reader_of(folder)
        try:
            whole = reader.config()
        except Unfit as error:
            raise ConvertError(str(error)) from None
        text = whole.get("text_config")
        fields = (
            {**{key: whole[key] for key in ("tie_word_embeddings",) if key in whole}, **text} if isinstance(text, dict) else whole
        )
        if fields.get("quantization_config") or whole.get("quantization_config"):
            raise ConvertError(
                f"{folder / CONFIG} has a quantization_config: quantised weights cannot be trained on; give the model as it was before"
            )
        depth = fields.get("num_hidden_layers")
        if isinstance(depth, int) and not 1 <= depth <= DEPTH.most:  # families make lists of so many
            raise ConvertError(f"{folder / CONFIG}: num_hidden_layers={depth} must be from 1 to {DEPTH.most}; restore the file")
        family = _family(fields.get("model_type"), folder)
        values = Values(fields)
        try:
            model = family.model(values)
            values.finish()
        except Unfit as error:
            raise ConvertError(f"{folder}: {error}") from None
        except (ValueError, ZeroDivisionError) as error:
            raise ConvertError(f"{folder / CONFIG} makes no model of this family: {error}") from None
        return cls(folder, reader, fields, family, model)


def _family(model_type: Any, folder: Path) -> Family:
    if not isinstance(model_type, str) or len(model_type) > _LONGEST:
        what = "no model_type" if model_type is None else f"model_type={shown(model_type)}, which is no name"
        raise ConvertError(f"{folder / CONFIG} has {what}; give the folder of a published model")
    if model_type in WAITING:
        raise ConvertError(f"{folder / CONFIG}: model_type={model_type!r} waits for {WAITING[model_type]}, which is not here yet")
    try:
        return MODEL_TYPES[model_type]()
    except ValueError as error:
        raise ConvertError(f"{folder / CONFIG}: {error}") from None


def part_shape(place: Place, shapes: Shapes) -> Shape:
    """That of what lies at a place."""
    return shapes[place.path].shape[len(place.index) :]


def check_lines(lines: Sequence[Line], shapes: Shapes) -> None:
    """Raises ConvertError unless the lines fill every array once and name every tensor once."""
    names = Counter(name for line in lines for name in line.tensors)
    places = Counter(place for line in lines for place in line.places)
    filled = Counter(place.path for place in places)
    parts = {place.path: math.prod(shapes[place.path].shape[: len(place.index)]) for place in places if place.path in shapes}
    wanted = {path: parts.get(path, 1) for path in shapes}
    problems = {
        "tensors named twice": [name for name, times in names.items() if times > 1],
        "parameters filled twice": [place.path for place, times in places.items() if times > 1],
        "parameters that no tensor fills": [path for path, times in wanted.items() if filled[path] < times],
        "parameters that the model has not": [path for path in filled if path not in wanted],
    }
    _refuse("this family's table does not fit the model", problems)


@dataclasses.dataclass(frozen=True)
class Examined:
    """A published model whose headers were read."""

    source: Source
    weights: Weights
    lines: list[Line]
    shapes: Shapes
    match: Match


def examined(folder: Path) -> Examined:
    """Raises ConvertError where it cannot be told what is there."""
    source = Source.of(folder)
    weights = source.reader.weights()
    weights.under(source.family.base, source.family.head)
    weights.rename(source.family.renamed)
    lines, shapes = source.family.table_for(source.model, weights), learned_shapes(source.model)
    check_lines(lines, shapes)
    return Examined(source, weights, lines, shapes, match(source, weights, lines, shapes))


@dataclasses.dataclass(frozen=True)
class Match:
    """How the tensors of a folder go with the lines of a table."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    quantised: list[str]

    def check(self, folder: Path) -> None:
        """Raises ConvertError unless each tensor is read once."""
        problems = {
            "missing tensors": self.missing,
            "tensors that nothing reads": self.unexpected,
            "tensors of another shape": self.misshapen,
            f"quantised tensors, which cannot be trained on (give {', '.join(DTYPES)})": self.quantised,
        }
        _refuse(f"{folder} does not hold the model that its {CONFIG} describes", problems)


def match(source: Source, weights: Weights, lines: Sequence[Line], shapes: Shapes) -> Match:
    """The lines against the tensors' names and shapes."""
    misshapen, quantised, asked = [], [], set()
    for line in lines:
        expected = line.transform.shapes([part_shape(place, shapes) for place in line.places])
        for name, shape in zip(line.tensors, expected, strict=True):
            asked.add(name)
            if name in weights and weights.tensors[name].shape != shape:
                misshapen.append(f"{name} {list(weights.tensors[name].shape)} for {list(shape)}")
            if name in weights and weights.tensors[name].dtype not in weights.dtypes:
                quantised.append(f"{name} is {weights.tensors[name].dtype}")
    family, depth = source.family, source.model.num_layers
    behind = source.fields.get(family.behind or "") or 0
    ignored = [f"{family.base}{family.layers_name}.{depth + i}.*" for i in range(behind)] + list(family.unread(source.model))
    ignored += [family.head] if source.model.tie_embeddings else []
    left = [name for name in weights if name not in asked and not _any(name, ignored)]
    return Match([name for name in asked if name not in weights], left, misshapen, quantised)


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse(what: str, problems: Mapping[str, Sequence[str]]) -> None:
    found = {kind: sorted(names) for kind, names in problems.items() if names}
    if not found:
        return
    raise ConvertError(f"{what}: " + "; ".join(f"{kind}: {some(names)}" for kind, names in found.items()))


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first of them in a message, and how many more there are."""
    return between.join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")

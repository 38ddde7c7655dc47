"""From a run folder to another at step 0, whose model is a reshaped one, with what that changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from plait.configs import codec
from plait.configs.components import Config
from plait.configs.domains import choices
from plait.configs.files import read_json
from plait.models.config import LMConfig
from plait.models.hf.places import Place, layer_places
from plait.models.hf.transforms import Shape
from plait.models.lm import fold
from plait.train.convert.arrays import filled, part_of
from plait.train.convert.fitting import Shapes, part_shape
from plait.train.convert.importing import new_run, require_new, untrained
from plait.train.convert.moved import Moved, moved
from plait.train.convert.reading import CONFIG as PUBLISHED_CONFIG
from plait.train.convert.reshapes.base import Making, Reshape, Subject
from plait.train.convert.sample import ids_of, num_ids_of
from plait.train.convert.weights import ConvertError
from plait.train.program import Program
from plait.train.run import Trained, opened, write_json
from plait.train.run_folder.contents import ORIGINALS
from plait.train.state import Arrays, Blueprint

REPORT = "reshape.json"
"""In the new run folder: what was changed, and by how much the logits moved."""
_LIMIT = "max_position_embeddings"

Step = tuple[tuple[Place, ...], tuple[Place, ...], Making]
"""Where the arrays lie in the old model, and in the new one, and what makes them."""


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """What a reshape changed."""

    source: str
    step: int
    """Of the old run's checkpoint."""
    reshape: Reshape
    changed: tuple[str, ...]
    """Options of the model and of its layers' mixers, as `path: old -> new`."""
    parameters: tuple[int, int]
    state_bytes: tuple[int, int]
    """Of decoding one sequence of `state_tokens`."""
    state_tokens: int
    moved: Moved

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {**dataclasses.asdict(self), "reshape": codec.encode(self.reshape)}

    def describe(self) -> str:
        """A few lines."""
        share = lambda before, after: f" ({100 * (after / before - 1):+.1f}%)" if before and before != after else ""
        shown = lambda pair: f"{pair[0]:,} -> {pair[1]:,}{share(*pair)}"
        return "\n".join(
            (
                f"changed     {'; '.join(self.changed) or 'nothing'}",
                f"parameters  {shown(self.parameters)}",
                f"state       {shown(self.state_bytes)} bytes for a sequence of {self.state_tokens:,} tokens",
                f"logits      {self.moved.describe()}",
            )
        )


def reshape_run(
    run: Path, folder: Path, reshape: Reshape, *, text: Path | None = None, step: int | None = None, seed: int = 0
) -> Reshaped:
    """Makes the run folder `folder` of the model in `run`, which stays as it is; it appears when it is whole.

    Args:
        text: on which logits are compared; random ids if None.
        seed: of what is drawn of it.

    Raises:
        ConvertError: the model cannot be reshaped so, or `folder` holds something; nothing is written.
    """
    require_new(folder)
    trained = opened(run, step)
    sample = None if text is None else ids_of(text, trained)
    old, params, buffers = _plain(trained)
    num_ids = num_ids_of(trained)
    before = old.config.model
    model = reshape.model(Subject(before, num_ids, _limit(run) or old.config.data.seq_len))
    config = dataclasses.replace(old.config, steps=1, model=model, optimizer=untrained(), out=str(folder), resume=False)
    program = Program.of(config, trained.program.mesh)
    arrays = {**params, **buffers}
    arrays = {**_buffers(reshape, old, program, arrays), **_arrays(reshape, old, program, arrays)}
    made, kept = ({k: v for k, v in arrays.items() if (k in program.blueprint.params) is own} for own in (True, False))
    length = config.data.seq_len
    found = Reshaped(
        source=str(run),
        step=trained.step,
        reshape=reshape,
        changed=tuple(_changes(trained.program.config.model, model, reshape.origins(before))),
        parameters=(old.num_params, program.blueprint.num_params),
        state_bytes=(_state_bytes(before, length), _state_bytes(model, length)),
        state_tokens=length,
        moved=moved(
            (old, params, buffers), (program.blueprint, made, kept), program.mesh, num_ids=num_ids, text=sample, seed=seed
        ),
    )
    identity = {name: value for name, value in trained.data.items() if name != "step"}

    def beside(new: Path) -> None:
        for name in ("tokenizer", ORIGINALS):
            if (run / name).is_dir():
                shutil.copytree(run / name, new / name)
        _lengthen(new, reshape)
        write_json(new / REPORT, found.to_json())

    new_run(folder, program, made, kept, identity, beside)
    return found


def _changes(old: LMConfig, new: LMConfig, origins: Sequence[int]) -> Iterator[str]:
    """What is another in the new model: options, layers, and of layers with another mixer what it is."""
    whole = lambda model: {key: value for key, value in codec.encode(model).items() if key not in ("mixers", "channel_mixers")}
    yield from codec.differences(whole(old), whole(new))
    if len(origins) < old.num_layers:
        yield f"layers: {choices(origins)} of 0 to {old.num_layers - 1}"
    for was, name in dict.fromkeys(zip((old.layers[origin] for origin in origins), new.layers, strict=True)):
        mixer, path = new.mixers[name], f"mixers.{name}"
        if type(old.mixers[was]) is type(mixer):
            yield from codec.differences(codec.encode(old.mixers[was]), codec.encode(mixer), path)
        else:
            own = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer)}
            yield f"{path}: " + ", ".join(f"{key}={value}" for key, value in own.items() if not isinstance(value, Config))


def _plain(trained: Trained) -> tuple[Blueprint, Arrays, Arrays]:
    """The old model without sigmaReparam and adapters, which are folded."""
    blueprint = trained.program.blueprint
    if blueprint.config.model.sigma_reparam is None and not blueprint.adapters:
        return blueprint, trained.params, trained.buffers
    model = fold(blueprint.build(trained.params, trained.buffers))
    plain = Blueprint(dataclasses.replace(blueprint.config, model=model.config))
    return plain, *plain.split(model)


def _state_bytes(model: LMConfig, length: int) -> int:
    mixers = sum(mixer.state_bytes(model.d_model, length, model.compute_dtype) for mixer in model.layer_mixers)
    return mixers + sum(one.state_bytes(model.d_model, model.compute_dtype) for one in model.layer_channel_mixers)


def _steps(reshape: Reshape, old: Blueprint, new: Blueprint) -> list[Step]:
    """What makes each parameter of the new model, those of one array together."""
    before, after = (_learned(blueprint) for blueprint in (old, new))
    was, now = old.config.model, new.config.model
    steps: list[Step] = []

    def add(
        makings: Iterable[Making], source: Place | None, target: Place | None, there: Collection[str], paths: Iterable[str]
    ) -> None:
        own = list(makings)
        done = {path for making in own for path in making.targets}
        own += [
            Making((path,), (path,), lambda x: [x]) if path in there else Making((), (path,), None)
            for path in paths
            if path not in done
        ]
        for making in own:
            steps.append((tuple(_at(source, p) for p in making.sources), tuple(_at(target, p) for p in making.targets), making))

    shapes = _inside(before, None), _inside(after, None)
    add(reshape.outside(*shapes), None, None, *shapes)
    places = layer_places(was)
    for origin, target, mixer in zip(reshape.origins(was), layer_places(now), now.layer_mixers, strict=True):
        source, shapes = places[origin], (_inside(before, places[origin]), _inside(after, target))
        same = was.layer_mixers[origin] == mixer
        add(() if same else reshape.layer(was.layer_mixers[origin], mixer, *shapes, origin), source, target, *shapes)
    order = {path: index for index, path in enumerate(dict.fromkeys(step[1][0].path for step in steps))}
    return sorted(steps, key=lambda step: order[step[1][0].path])


def _at(place: Place | None, path: str) -> Place:
    return Place(path) if place is None else Place(f"{place.path}.{path}", place.index)


def _inside(shapes: Shapes, place: Place | None) -> dict[str, Shape]:
    """Shapes of the arrays of a layer by their paths in it; None: of those outside of the layers."""
    if place is None:
        return {path: like.shape for path, like in shapes.items() if not path.startswith("stack.")}
    inside = [path for path in shapes if path.startswith(f"{place.path}.")]
    return {path.removeprefix(f"{place.path}."): part_shape(Place(path, place.index), shapes) for path in inside}


def _learned(blueprint: Blueprint) -> Shapes:
    params, buffers = blueprint.shapes()
    return {path: like for path, like in {**params, **buffers}.items() if path in blueprint.learned}


def _shardings(program: Program) -> dict[str, NamedSharding]:
    params, buffers = program.blueprint.shardings(program.mesh)
    return {**params, **buffers}


def _fresh(program: Program, paths: set[str]) -> Arrays:
    """What a new model begins with."""
    shardings = {path: sharding for path, sharding in _shardings(program).items() if path in paths}

    def begin() -> Arrays:
        params, buffers = program.blueprint.init()
        return {path: array for path, array in {**params, **buffers}.items() if path in paths}

    return jax.jit(begin, out_shardings=shardings)() if paths else {}


def _arrays(reshape: Reshape, old: Blueprint, program: Program, arrays: Arrays) -> Arrays:
    """The parameters of the new model."""
    shapes, steps = _learned(program.blueprint), _steps(reshape, old, program.blueprint)
    fresh = _fresh(program, {place.path for _, targets, making in steps if making.make is None for place in targets})

    def parts() -> Iterator[tuple[Place, np.ndarray]]:
        for sources, targets, making in steps:
            given = [part_of(arrays[one.path], one) for one in sources]
            found = [part_of(fresh[one.path], one) for one in targets] if making.make is None else making.make(*given)
            for place, value in zip(targets, found, strict=True):
                if value.shape != part_shape(place, shapes):
                    raise ConvertError(f"{reshape.name} makes {place.path} {value.shape}, and it is {part_shape(place, shapes)}")
                yield place, value

    return filled(parts(), shapes, _shardings(program))


def _buffers(reshape: Reshape, old: Blueprint, program: Program, arrays: Arrays) -> Arrays:
    """What else the new model has: as it was, but for flags, which say where a layer stands, and what the old one has not."""
    params, buffers = program.blueprint.shapes()
    shapes = {path: like for path, like in {**params, **buffers}.items() if path not in program.blueprint.learned}
    places = layer_places(old.config.model)
    wanted: dict[str, list[tuple[Place, Place]]] = {}
    for origin, target in zip(reshape.origins(old.config.model), layer_places(program.config.model), strict=True):
        for path in _inside(shapes, target):
            wanted.setdefault(f"{target.path}.{path}", []).append((_at(target, path), _at(places[origin], path)))
    same = {
        path: pairs
        for path, pairs in wanted.items()
        if shapes[path].dtype != np.bool_ and all(source.path in arrays for _, source in pairs)
    }
    kept = ((target, part_of(arrays[source.path], source)) for pairs in same.values() for target, source in pairs)
    return {**_fresh(program, set(shapes) - set(same)), **filled(kept, shapes, _shardings(program))}


def _limit(run: Path) -> int | None:
    """The longest sequence of the published model that a run was made of."""
    path = run / ORIGINALS / PUBLISHED_CONFIG
    found = read_json(path, infinities=True) if path.is_file() else {}
    return next((one[_LIMIT] for one in (found.get("text_config") or {}, found) if isinstance(one.get(_LIMIT), int)), None)


def _lengthen(new: Path, reshape: Reshape) -> None:
    """Lets the published config say how long sequences can be now."""
    path = new / ORIGINALS / PUBLISHED_CONFIG
    tokens = _limit(new)
    if tokens is None or reshape.longest(tokens) == tokens:
        return
    found = read_json(path, infinities=True)
    (found.get("text_config") or found)[_LIMIT] = reshape.longest(tokens)
    path.write_text(json.dumps(found, indent=2) + "\n")

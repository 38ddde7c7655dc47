"""From a run folder to the folder of a published model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from plait.configs.codec import encode, leaves
from plait.configs.files import read_json
from plait.models.config import OF_TRAINING, LMConfig
from plait.models.hf.base import MODEL_TYPES, Family, Unfit
from plait.models.hf.values import Values
from plait.models.lm import fold, learned_shapes
from plait.train.convert.arrays import part_of, written
from plait.train.convert.fitting import check_lines, part_shape, some
from plait.train.convert.importing import FLOAT32, appearing, require_new
from plait.train.convert.reading import BESIDE, CONFIG
from plait.train.convert.weights import ConvertError, Planned, write_weights
from plait.train.pods.hosts.together import first, together
from plait.train.run import Trained, opened
from plait.train.run_folder.contents import ORIGINALS
from plait.train.state import Blueprint

EXPORTED = ("float32", "bfloat16", "float16")
"""Dtypes of tensors that are written."""
OWN = "plait"
"""The model type that any model has."""
_OF_TRAINING = (
    "pattern",
    "mixers",
    "channel_mixer",
    "channel_mixers",
    "norms",
    *OF_TRAINING,
)
"""Fields that are compared by layer, or say nothing of the function that a folded model is."""
_STALE = ("rope_theta", "rope_scaling", "torch_dtype", "text_config")
"""Older names of fields that are written by newer ones."""


def function_of(model: LMConfig) -> dict[str, Any]:
    """What a model computes, in fields that are equal where that is equal."""
    found = {key: value for key, value in encode(model).items() if key not in _OF_TRAINING}
    mixers = [encode(mixer.function(model.d_model)) for mixer in model.layer_mixers]
    channel_mixers = [
        None if one is None else encode(one.function(model.d_model)) for one in map(model.channel_mixer_of, model.layers)
    ]
    norms = [model.norm_of(name) for name in model.layers]
    return {**found, "mixers": mixers, "channel_mixers": channel_mixers, "norms": norms}


def home(model: LMConfig, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that has such a model, and the fields of its config: that of `model_type`, or the first that fits, or our own.

    Raises:
        ConvertError: `model_type` is unknown, or has no such models.
    """
    if model_type is not None:
        try:
            family = MODEL_TYPES[model_type]()
        except ValueError as error:
            raise ConvertError(str(error)) from None
        try:
            return family, _values(family, model)
        except Unfit as error:
            raise ConvertError(f"the model is no {model_type}: {error}; leave --model-type out to see where it fits") from None
    for name, kind in MODEL_TYPES.all().items():
        if name != OWN:
            try:
                return kind(), _values(kind(), model)
            except Unfit:
                continue
    own = MODEL_TYPES[OWN]()
    return own, _values(own, model)


def _values(family: Family, model: LMConfig) -> dict[str, Any]:
    """The fields of a family's config for a model. Raises Unfit unless they give that very model."""
    fields = {"architectures": [family.architecture], "model_type": family.name, **family.values(model)}
    try:
        there, here = (leaves(function_of(one)) for one in (family.model(Values(fields)), model))
    except ValueError as error:
        raise Unfit(str(error)) from None
    missing = "nothing"
    if different := [
        f"{key} is {here.get(key, missing)} here and {there.get(key, missing)} there"
        for key in {**here, **there}
        if here.get(key, missing) != there.get(key, missing)
    ]:
        raise Unfit(some(different, "; "))
    return fields


def export_model(
    run: Path,
    folder: Path,
    *,
    model_type: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    step: int | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Family:
    """Writes the model of a run folder to `folder`, which appears when it is whole; the family that it is now of. Several hosts that hold the
    model give their parts, one array at a time, and the first writes. Without `dtype`, tensors have that of the model that was imported, or
    else of the run's parameters; those that must stay float32, or were where all others were not, do so.

    Raises:
        ConvertError: `folder` holds something, or the model is none of `model_type`.
    """
    with together("model"):
        require_new(folder)
    trained = opened(run, step)
    model = fold(trained.program.blueprint.build(trained.params, trained.buffers))
    family, fields = home(model.config, model_type)
    blueprint = Blueprint(dataclasses.replace(trained.program.config, model=model.config))
    params, buffers = blueprint.split(model)
    arrays, shapes = {**params, **buffers}, learned_shapes(model.config)
    lines = family.table(model.config)
    check_lines(lines, shapes)
    before = _original(run).get("dtype", _original(run).get("torch_dtype"))
    kept = np.dtype(dtype or (before if before in EXPORTED else model.config.param_dtype))
    wide = _float32(run) if dtype is None else frozenset()
    tensors = []
    for name, line, index in written(lines):
        shape = line.transform.shapes([part_shape(place, shapes) for place in line.places])[index]
        make = lambda line=line, index=index: line.transform.write([part_of(arrays[place.path], place) for place in line.places])[
            index
        ]
        tensors.append(Planned(name, shape, np.dtype(np.float32) if line.float32 or name in wide else kept, make))
    with appearing(folder) as new:
        write_weights(new, sorted(tensors, key=lambda tensor: tensor.name), shard_bytes)
        with together("run folder"):
            if first():
                _write_config(new, run, trained, {**fields, "dtype": kept.name}, family.stale)
                _write_tokenizer(new, run, trained)
    return family


def _original(run: Path) -> Mapping[str, Any]:
    """The config that the model was imported with; nothing where it was not."""
    path = run / ORIGINALS / CONFIG
    found = read_json(path, infinities=True) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ConvertError(f"{path} is {type(found).__name__}, not an object; restore it")
    return found.get("text_config", found)


def _float32(run: Path) -> frozenset[str]:
    """The tensors that were float32 among others where the model was imported from."""
    path = run / ORIGINALS / FLOAT32
    found = read_json(path) if path.is_file() else []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConvertError(f"{path} must be a list of tensors' names; restore it, or say --dtype")
    return frozenset(found)


def _write_config(new: Path, run: Path, trained: Trained, fields: Mapping[str, Any], stale: Sequence[str]) -> None:
    before = _original(run)
    same = before.get("model_type") == fields["model_type"]
    base = {key: value for key, value in before.items() if key not in (*_STALE, *stale)} if same else {}
    config = {"max_position_embeddings": trained.program.config.data.seq_len, **base, **fields}
    ids: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }  # or else a family's own, beyond this vocabulary
    if trained.tokenizer is not None:
        ids |= {"bos_token_id": trained.tokenizer.bos_id, "eos_token_id": trained.tokenizer.eos_id}
    config = {**ids, **config}
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(new: Path, run: Path, trained: Trained) -> None:
    """The files beside the weights: those of the import, or what the run's tokenizer says."""
    for name in BESIDE:
        if name != CONFIG and (run / ORIGINALS / name).is_file():
            shutil.copyfile(run / ORIGINALS / name, new / name)
    tokenizer = trained.tokenizer
    if tokenizer is None or (new / "tokenizer.json").exists():
        return
    (new / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    names = {"bos_token": tokenizer.token_name(tokenizer.bos_id), "eos_token": tokenizer.token_name(tokenizer.eos_id)}
    (new / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2) + "\n"
    )

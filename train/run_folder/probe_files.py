"""Probe arrays of a run: `probes/`."""

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.train.run_folder.lines import strict

log = logging.getLogger(__name__)

PROBES = "probes"
LAYERS, ATTENTION = f"{PROBES}/layers.json", f"{PROBES}/attention.npz"


@dataclass(frozen=True)
class ProbeSeries:
    """The probe files of a run: `arrays[name]` is float32 [N, L, ...] over the N `steps`, NaN where a file had no value."""

    steps: np.ndarray
    arrays: dict[str, np.ndarray]
    layers: list[dict[str, Any]] = field(default_factory=list)
    first_k: int = 0
    notes: list[str] = field(default_factory=list)
    """Sentences about files that could not be read."""


def write_layers(run: Path, layers: Sequence[Mapping[str, Any]], first_k: int) -> None:
    """Writes `probes/layers.json`: for each layer its index, mixer, kind (linear, full, ...), num_heads and
    head_kinds (attention or state)."""
    tree = {"layers": [dict(layer) for layer in layers], "first_k": first_k}
    write_atomically(Path(run) / LAYERS, json.dumps(strict(tree), indent=1, allow_nan=False))


def write_probes(run: Path, step: int, probes: Mapping[str, np.ndarray]) -> Path:
    """The path of the new `probes/step_*.npz`, which holds each array as float32."""
    path = probe_path(run, step)
    _write_npz(path, {name: np.asarray(value, np.float32) for name, value in probes.items()})
    return path


def write_attention(run: Path, step: int, maps: np.ndarray, tokens: Sequence[str]) -> Path:
    """The path of `probes/attention.npz`: implied attention [L, H, T, T] as float16, its T token strings, and the step."""
    path = Path(run) / ATTENTION
    arrays = {"maps": np.asarray(maps, np.float16), "tokens": np.asarray(list(tokens), np.str_), "step": np.asarray(step)}
    _write_npz(path, arrays)
    return path


@dataclass(frozen=True)
class Layer:
    """An entry of `layers.json`."""

    index: int
    mixer: str
    kind: str
    num_heads: int
    head_kinds: tuple[str, ...] | None = None
    """None in files from before heads had kinds: those of a layer were alike."""


@dataclass(frozen=True)
class Layers:
    """What `layers.json` holds."""

    layers: tuple[Layer, ...] = ()
    first_k: int = 0


def read_probes(run: Path, files: Sequence[Path] | None = None) -> ProbeSeries:
    """Every probe file of a run, or those given, stacked over steps; a file that cannot be read, or is not like the others, is left out
    and named in `notes`."""
    run, notes, read = Path(run), [], {}
    for path in probe_files(run) if files is None else files:
        try:
            arrays = read_npz(path)
            if any(array.dtype.kind not in "fiu" for array in arrays.values()):
                raise ValueError(f"{path.name} holds what are no numbers")
            read[step_of(path)] = {name: array.astype(np.float32) for name, array in arrays.items()}
        except ValueError as error:
            notes.append(f"{error} and was ignored")
    names = dict.fromkeys(name for arrays in read.values() for name in arrays)
    ranks = {name: Counter(a[name].ndim for a in read.values() if name in a).most_common(1)[0][0] for name in names}
    for step, arrays in list(read.items()):
        if any(array.ndim != ranks[name] or array.ndim < 1 for name, array in arrays.items()):
            notes.append(f"{probe_path(run, step).name} holds arrays of another shape and was ignored")
            del read[step]
    layers, first_k = _read_layers(run / LAYERS, notes)
    for note in notes:
        log.warning("%s: %s", run, note)
    names = dict.fromkeys(name for arrays in read.values() for name in arrays)
    stacked = {name: _stack([arrays.pop(name, None) for arrays in read.values()]) for name in names}
    return ProbeSeries(np.asarray(list(read), np.int64), stacked, layers, first_k, notes)


def _read_layers(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The entries of `layers.json` and its `first_k`, nothing where it cannot be read."""
    if not path.exists():
        return [], 0
    try:
        tree = codec.load(Layers, path)
        for index, layer in enumerate(tree.layers):
            if layer.index != index or not 0 <= layer.num_heads <= _MOST_HEADS:
                raise ValueError(f"{path}: layers.{index} is layer {layer.index} of {layer.num_heads} heads")
            if layer.head_kinds is not None and len(layer.head_kinds) != layer.num_heads:
                raise ValueError(f"{path}: layers.{index} has {layer.num_heads} heads and {len(layer.head_kinds)} kinds of them")
    except ValueError as error:
        notes.append(f"{path.name} cannot be read ({error}) and was ignored")
        return [], 0
    return [_with_head_kinds(layer) for layer in tree.layers], tree.first_k


def _with_head_kinds(layer: Layer) -> dict[str, Any]:
    kinds = layer.head_kinds
    if kinds is None:
        kinds = ("state" if layer.kind == "linear" else "attention",) * layer.num_heads
    return {**asdict(layer), "head_kinds": list(kinds)}


_MOST_HEADS = 1 << 16


def probe_path(run: Path, step: int) -> Path:
    """The file of a probe step."""
    return Path(run) / PROBES / f"step_{step:08d}.npz"


def probe_files(run: Path) -> list[Path]:
    """The files `probes/step_*.npz` of a run in the order of their steps; no other file."""
    folder = Path(run) / PROBES
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(r"step_[0-9]{8,15}\.npz", path.name) and path.is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a probe file, from its name."""
    return int(path.stem.removeprefix("step_"))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises:
      ValueError: it cannot be read; the message begins with the file's name.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # whatever a zip or an array header raises on bytes that are not what they were
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _stack(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """Arrays of one rank stacked along a new first axis, padded with NaN to the widest; None becomes NaN."""
    shapes = [array.shape for array in arrays if array is not None]
    stacked = np.full((len(arrays), *np.max(shapes, axis=0)), np.nan, np.float32)
    for row, array in zip(stacked, arrays):
        if array is not None:
            row[tuple(slice(size) for size in array.shape)] = array
    return stacked

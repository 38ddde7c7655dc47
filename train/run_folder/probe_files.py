"""Probe arrays of a run: `probes/`."""

import io
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
    path = Path(run) / PROBES / f"step_{step:08d}.npz"
    _write_npz(path, {name: np.asarray(value, np.float32) for name, value in probes.items()})
    return path


def write_attention(run: Path, step: int, maps: np.ndarray, tokens: Sequence[str]) -> Path:
    """The path of `probes/attention.npz`: implied attention [L, H, T, T] as float16, its T token strings, and the step."""
    path = Path(run) / ATTENTION
    arrays = {"maps": np.asarray(maps, np.float16), "tokens": np.asarray(list(tokens), np.str_), "step": np.asarray(step)}
    _write_npz(path, arrays)
    return path


def read_probes(run: Path) -> ProbeSeries:
    """Every probe file of a run, stacked over steps; a file that cannot be read is left out and named in `notes`."""
    run, notes, files = Path(run), [], {}
    for path in probe_files(run):
        try:
            with np.load(io.BytesIO(path.read_bytes())) as arrays:
                files[step_of(path)] = {name: np.asarray(arrays[name], np.float32) for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            notes.append(f"{path.name} cannot be read ({error}) and was ignored")
    for note in notes:
        log.warning("%s: %s", run, note)
    tree = json.loads((run / LAYERS).read_text()) if (run / LAYERS).exists() else {}
    layers = [_with_head_kinds(layer) for layer in tree.get("layers", [])]
    names = dict.fromkeys(name for arrays in files.values() for name in arrays)
    stacked = {name: _stack([arrays.get(name) for arrays in files.values()]) for name in names}
    return ProbeSeries(np.asarray(list(files), np.int64), stacked, layers, tree.get("first_k", 0), notes)


def _with_head_kinds(layer: dict[str, Any]) -> dict[str, Any]:
    """An entry of `layers.json`, also from before heads had kinds: those of a layer were alike."""
    return {"head_kinds": ["state" if layer["kind"] == "linear" else "attention"] * layer["num_heads"], **layer}


def probe_files(run: Path) -> list[Path]:
    """The files `probes/step_*.npz` of a run in the order of their steps."""
    return sorted((Path(run) / PROBES).glob("step_*.npz"), key=step_of)


def step_of(path: Path) -> int:
    """The step of a probe file, from its name."""
    return int(path.stem.removeprefix("step_"))


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

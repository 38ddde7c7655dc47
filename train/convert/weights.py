"""The tensors of a folder of safetensors files: which there are, each read when it is asked for, and files written whole."""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from plait.configs.domains import is_line, shown
from plait.configs.files import parse_json, read_json
from plait.models.hf.transforms import Shape, size_of
from plait.train.pods.hosts.together import first, together

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16", "F64")
"""Those that weights can have, as files name them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WRAPPERS = ("model.language_model.", "language_model.model.", "model.text_model.")
"""Where multimodal models keep what is `model.` in the language model alone."""
_SHARD_BYTES = 5 * 10**9


class ConvertError(ValueError):
    """A folder or a model that cannot be converted; the message says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a published model."""

    file: Path
    name: str
    """In the file."""
    shape: Shape
    dtype: str
    """As the file names it."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConvertError(f"{self.file} has a tensor without a name; download it again")
        if not is_line(self.name):
            raise ConvertError(f"{self.file} has a tensor named {shown(self.name)}, with control characters; do not trust it")


class Weights(abc.ABC):
    """The tensors of a published model by their names in the language model; reads headers only, until `read`."""

    files: Sequence[Path]
    tensors: dict[str, Tensor]
    other: list[str]
    """Tensors beside the language model."""
    dtypes: Sequence[str] = DTYPES
    """Those that `read` gives numbers of."""

    def under(self, base: str, head: str) -> None:
        """Puts `base` before all names but that of the head where no name has it, as in files that were saved without the head."""
        if not any(name.startswith(base) for name in self.tensors):
            self.tensors = {name if name == head else base + name: tensor for name, tensor in self.tensors.items()}

    def rename(self, parts: Mapping[str, str]) -> None:
        """Changes parts of names, between dots. Raises ConvertError where two tensors come to one name."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            new = ".".join(parts.get(part, part) for part in name.split("."))
            if new in found:
                raise ConvertError(f"{tensor.name} is there beside {found[new].name}, another name of the same; keep one of them")
            found[new] = tensor
        self.tensors = found

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor, in its dtype, or where it is quantised in float32. Raises ConvertError where it cannot be read."""


class FolderWeights(Weights):
    """Those of a folder of safetensors files."""

    def __init__(self, folder: Path):
        """Raises ConvertError: no weights, pickled ones, a file cut short or missing, or a name twice."""
        self.files = _files(folder)
        self.tensors, self.other = {}, []
        found: dict[str, Tensor] = {}
        for file in self.files:
            for tensor in _header(file):
                if tensor.name in found:
                    raise ConvertError(f"{tensor.name} is in {found[tensor.name].file.name} and in {file.name}; keep one of them")
                found[tensor.name] = tensor
        _check_index(folder, found)
        wrapper = next((w for w in WRAPPERS if any(name.startswith(w) for name in found)), None)
        for name, tensor in found.items():
            if wrapper is None:
                self.tensors[name] = tensor
            elif name.startswith(wrapper):
                self.tensors[f"model.{name.removeprefix(wrapper)}"] = tensor
            elif name.endswith("lm_head.weight"):
                self.tensors["lm_head.weight"] = tensor
            else:
                self.other.append(name)

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            with safe_open(tensor.file, framework="numpy") as file:
                return file.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{tensor.file} cannot be read at {tensor.name} ({error}); download it again") from None


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: what its index lists, or the one that there is."""
    if not folder.is_dir():
        raise ConvertError(f"{str(folder)!r} is no folder; give one with config.json and model.safetensors")
    index = folder / INDEX
    _check_link(index)
    if index.exists():
        names = _index(index).values()
        for name in names:
            if not re.fullmatch(r"[\w][\w.-]{0,199}\.safetensors", name):
                raise ConvertError(
                    f"{index} names the file {shown(name)}, which is no plain name of a .safetensors file; do not trust it"
                )
        files = [folder / name for name in sorted(set(names))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConvertError(
                f"{index} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there; download again"
            )
        return files
    if (folder / ONE).is_file():
        return [folder / ONE]
    _check_link(folder / ONE)
    if (folder / ONE).exists():
        what = "a folder" if (folder / ONE).is_dir() else "a pipe or device"
        raise ConvertError(f"{folder / ONE} is {what}, and a file of that name is wanted; give the folder of a published model")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ConvertError(
            f"{folder} has its weights in {', '.join(pickles[:3])}, pickled files, which run what they hold when they are read; "
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)"
        )
    there = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(there[:3])} and no index of them" if there else ""
    raise ConvertError(f"{folder} has no {ONE} and no {INDEX}{hint}; give the folder of a published model")


def _check_link(path: Path) -> None:
    """Raises ConvertError where a link leads to nothing, as in a download that ended early."""
    if path.is_symlink() and not path.exists():
        raise ConvertError(f"{path} is a link to {path.readlink()}, which is no file; download again")


def _index(path: Path) -> dict[str, str]:
    """File of each tensor."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(value, str) for value in table.values()):
        raise ConvertError(f"{path} has no weight_map of tensors to files; download it again")
    return table


def _check_index(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Raises ConvertError where the index and the files disagree."""
    path = folder / INDEX
    if not path.exists():
        return
    table = _index(path)
    lost = [name for name, file in table.items() if name not in found or found[name].file.name != file]
    if lost:
        raise ConvertError(f"{path} puts {lost[0]} into {table[lost[0]]}, which has it not ({len(lost)} such); download again")


def _header(file: Path) -> list[Tensor]:
    """The tensors of a file, from its header, of which the library says whether it fits the file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
            facts = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts]
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{file} is not a whole safetensors file ({error}); download it again") from None
    with file.open("rb") as raw:
        header = raw.read(int.from_bytes(raw.read(8), "little"))
    try:
        parse_json(header)  # in which the library passes over a name that is there twice
    except ValueError as error:
        raise ConvertError(f"{file} has a header that cannot be used: {error}; download it again") from None
    return [Tensor(file, name, shape, dtype) for name, shape, dtype in facts]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # the library's own is for its user alone
    try:
        save_file(arrays, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # in which the library hides what the disk says
        raise OSError(f"{path} cannot be written ({error}); make room or mend the disk, then begin anew") from None


def write_weights(folder: Path, tensors: Sequence[Planned], shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes tensors to `folder` in files of at most `shard_bytes` where a tensor allows, with an index where there are several; one file's
    tensors are in memory at a time. Of several hosts, each makes the tensors and the first writes."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        size = size_of(tensor.shape, tensor.dtype.itemsize)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    names = [ONE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        arrays = {}
        for tensor in shard:
            made = tensor.make()  # on every host: it may lie on several
            if first():
                arrays[tensor.name] = np.ascontiguousarray(made.astype(tensor.dtype))
        with together("weights"):
            if first():
                _save(arrays, folder / name)
    if len(shards) > 1 and first():
        total = sum(size_of(tensor.shape, tensor.dtype.itemsize) for tensor in tensors)
        table: dict[str, Any] = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")

"""A GGUF file as a published model: config, weights, tokenizer and chat template."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from plait.data.tokenizers.files import CONFIG_FILE
from plait.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from plait.data.tokenizers.tokenizer_json import JsonTokenizer
from plait.train.convert.gguf.file import TYPES, Entry, GGUFFile
from plait.train.convert.gguf.names import FREQUENCIES, architecture_of, config_of, tensor_name
from plait.train.convert.gguf.tokenizer import tokenizer_files
from plait.train.convert.reading import CONFIG, TEMPLATE, Reader
from plait.train.convert.weights import ConvertError, Tensor, Weights

PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}
"""Types of tensors that are kept as numbers."""


class GGUFWeights(Weights):
    """Its tensors by the names of the family, quantised ones as float32."""

    dtypes = tuple(kind.name for kind in TYPES.values())

    def __init__(self, file: GGUFFile):
        """Raises ConvertError: an unknown architecture, or a name twice."""
        self._file, self._architecture = file, architecture_of(file)
        self.files = [file.path]
        self.other = [entry.name for entry in file.entries if entry.name == FREQUENCIES]
        self._entries = {entry.name: entry for entry in file.entries if entry.name != FREQUENCIES}
        self.tensors = {}
        for entry in file.entries:
            if (name := tensor_name(entry.name)) in self.tensors:
                raise ConvertError(f"{file.path} has {entry.name} twice; download it again")
            if entry.name in self._entries:
                self.tensors[name] = Tensor(file.path, entry.name, entry.shape, entry.type.name)

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[self.tensors[name].name]
        values = numbers(self._file, entry)
        heads = self._heads(entry.name)
        if heads is None:
            return values
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # rows of a head: (0, 0), (0, 1), (1, 0), ...
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _heads(self, name: str) -> int | None:
        """How many heads a tensor's rows are of, where pairs of them stand beside each other."""
        stem = name.split(".")[-2]
        if stem not in ("attn_q", "attn_k") or not self._architecture.pairs:
            return None
        prefix = f"{self._file.metadata['general.architecture']}.attention.head_count"
        heads = self._file.metadata[prefix]
        return heads if stem == "attn_q" else self._file.metadata.get(f"{prefix}_kv", heads)


def numbers(file: GGUFFile, entry: Entry) -> np.ndarray:
    """A tensor's. Raises ConvertError for a quantised one where the package `gguf` is missing."""
    kept = file.bytes_of(entry)
    if entry.type.name in PLAIN:
        return kept.view(PLAIN[entry.type.name]).reshape(entry.shape)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ConvertError(
            f"{file.path} keeps {entry.name} as {entry.type.name}, and quantised tensors are read by the package gguf, which is not "
            "installed; pip install 'plait[gguf]', or give an F16 file"
        ) from None
    return dequantize(kept.reshape(*entry.shape[:-1], -1), GGMLQuantizationType[entry.type.name])


class GGUFReader(Reader):
    """See the module."""

    def __init__(self, path: Path):
        """Raises ConvertError where it is no whole file of a known architecture."""
        self.path = path
        self._file = GGUFFile(path)
        architecture_of(self._file)

    def config(self) -> dict[str, Any]:
        frequencies = next((entry for entry in self._file.entries if entry.name == FREQUENCIES), None)
        return config_of(self._file, None if frequencies is None else numbers(self._file, frequencies))

    def weights(self) -> GGUFWeights:
        return GGUFWeights(self._file)

    def tokenizer(self) -> Tokenizer:
        text, config = self._tokenizer_files
        return JsonTokenizer(text, eos=config.get("eos_token"), bos=config.get("bos_token"), where=str(self.path))

    def beside(self) -> Iterator[tuple[str, bytes]]:
        as_json = lambda value: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        yield CONFIG, as_json(self.config())
        with contextlib.suppress(ConvertError):  # the import was given another
            text, config = self._tokenizer_files
            yield TOKENIZER_FILE, text.encode()
            yield CONFIG_FILE, as_json(config)
        template = self._file.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            yield TEMPLATE, template.encode()

    @functools.cached_property
    def _tokenizer_files(self) -> tuple[str, dict[str, Any]]:
        return tokenizer_files(self._file.metadata, str(self.path))

"""What a published model is read from: its config, its weights, and what else travels with it."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plait.configs.files import read_json
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from plait.train.convert.weights import ConvertError, FolderWeights, Weights

CONFIG, TEMPLATE = "config.json", "chat_template.jinja"
BESIDE = (
    CONFIG,
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
)
"""The files that travel; those of weights do not, nor does code."""


class Reader(abc.ABC):
    """Of one way in which models are published."""

    path: Path

    @abc.abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The content of its `config.json`. Raises ConvertError where there is none."""

    @abc.abstractmethod
    def weights(self) -> Weights:
        """Raises ConvertError where they are not whole."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Raises ConvertError or DataError where there is none that can be used."""

    @abc.abstractmethod
    def beside(self) -> Iterator[tuple[str, bytes]]:
        """Names, of `BESIDE`, and contents of the files that travel."""


class FolderReader(Reader):
    """A folder with `config.json` and safetensors files."""

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> Mapping[str, Any]:
        try:
            found = read_json(self.path / CONFIG, infinities=True)
        except FileNotFoundError:
            raise ConvertError(f"{str(self.path)!r} has no {CONFIG}; give the folder of a published model") from None
        except ValueError as error:
            raise ConvertError(str(error)) from None
        if not isinstance(found, dict):
            raise ConvertError(f"{self.path / CONFIG} is {type(found).__name__}, not an object; restore it")
        return found

    def weights(self) -> FolderWeights:
        return FolderWeights(self.path)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def beside(self) -> Iterator[tuple[str, bytes]]:
        for name in BESIDE:
            if (self.path / name).is_file():
                yield name, (self.path / name).read_bytes()


def reader_of(path: Path) -> Reader:
    """Of a folder, or of a GGUF file. Raises ConvertError where a file is none."""
    if path.is_file():
        from plait.train.convert.gguf.reader import GGUFReader

        return GGUFReader(path)
    return FolderReader(path)

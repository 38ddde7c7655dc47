"""Tokenizers in folders: ours with their description, and published ones with their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.configs import codec
from plait.configs.components import ConfigError
from plait.configs.files import read_json
from plait.data.cache import checksum
from plait.data.config import DataError
from plait.data.remote.tree import fetch, fetched, local
from plait.data.tokenizers.tokenizer import META_FILE, TOKENIZER_FILE, ByteTokenizer, Tokenizer, TokenizerMeta
from plait.data.tokenizers.tokenizer_json import JsonTokenizer

CONFIG_FILE = "tokenizer_config.json"
"""In which published tokenizers name their end token."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at a path: a tokenizer.json, a folder that has one, or a run folder.

    The end token is the one named by our own description or by a tokenizer_config.json beside it, else a usual name.

    Raises:
        DataError: nothing there, not usable, or not what was written.
    """
    path = local(path, "data.tokenizer")
    candidates = [path] if path.is_file() else [path / TOKENIZER_FILE, path / "tokenizer" / TOKENIZER_FILE]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise DataError(f"data.tokenizer={str(path)!r} is no tokenizer.json and has none; use byte, bpe, or the path of one")
    fetch([file, file.parent / META_FILE, file.parent / CONFIG_FILE], "data.tokenizer")
    meta = read_meta(file.parent)
    if meta is not None and meta.kind == "byte":
        return ByteTokenizer()
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a tokenizer.json: {error}; use the file that `tokenizers` writes") from None
    eos, bos = _published_ends(file.parent) if meta is None else (meta.eos, meta.bos)
    tokenizer = JsonTokenizer(text, eos=eos, bos=bos, where=str(file))
    if meta is not None and meta.fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{file} is not what {META_FILE} beside it describes; restore it, or delete {META_FILE} to take it as it is"
        )
    return tokenizer


def read_meta(folder: Path) -> TokenizerMeta | None:
    """What `Tokenizer.save` wrote about the tokenizer in this folder; None for one that is not ours. Raises DataError where it is damaged."""
    file = folder / META_FILE
    if not file.exists():
        return None
    try:
        meta = codec.load(TokenizerMeta, fetched(file, "data.tokenizer"))
    except ConfigError as error:
        raise DataError(f"{error}; restore it, or delete it") from None
    if meta.check not in (None, checksum(meta)):
        raise DataError(f"{file} is not what was written there; restore it, or delete it")
    return meta


def _published_ends(folder: Path) -> tuple[str | None, str | None]:
    """Names of the end and start tokens in the configuration beside a published tokenizer, where it has one."""
    file = folder / CONFIG_FILE
    try:
        beside = read_json(file) if file.exists() else {}
    except ValueError as error:
        raise DataError(str(error)) from None
    if not isinstance(beside, dict):
        raise DataError(f"{file} is {type(beside).__name__}, not an object; restore it, or delete it")
    eos, bos = (_token_name(beside.get(key), file, key) for key in ("eos_token", "bos_token"))
    return eos, bos


def _token_name(value: Any, file: Path, key: str) -> str | None:
    name = value.get("content") if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise DataError(f"{file} has {key}={value!r}, which is no name; give the token as text")
    return name or None

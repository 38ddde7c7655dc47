"""A folder of shards: its description, written when the last shard is there, and what a run knows of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from plait.configs import codec
from plait.configs.files import write_atomically
from plait.data.cache import checksum
from plait.data.config import DataConfig, DataError
from plait.data.corpus import INDEX, TOKENS, VERIFY_BYTES, sha256_of
from plait.data.remote.tree import fetch, fetched, local
from plait.data.shards.shard import ShardMeta, damaged, name_of, open_shard
from plait.data.sources.source import PREPARED
from plait.data.tokenizers.files import load_tokenizer, read_meta
from plait.data.tokenizers.tokenizer import Tokenizer

FORMAT = 1
TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class PreparedMeta:
    """What prepared.json holds."""

    check: str | None = None
    format: int
    source: str
    fingerprint: str
    """Of the text and how it is divided: the same on every machine."""
    tokenizer: str
    """Fingerprint."""
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_token_bytes: int
    shards: tuple[ShardMeta, ...]
    """In order."""


@dataclass(frozen=True)
class Prepared:
    """A folder of shards, opened."""

    folder: Path
    meta: PreparedMeta

    def tokenizer(self) -> Tokenizer:
        """The one that made the ids. Raises DataError where it is not there."""
        found = load_tokenizer(self.folder / TOKENIZER)
        if found.fingerprint != self.meta.tokenizer:
            raise DataError(
                f"{self.folder / TOKENIZER} is another tokenizer than the one that made the shards; put that one back, or prepare again"
            )
        return found

    def open(self, number: int, *, tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (where they are asked for) and index of a shard, memory-mapped. Raises DataError where it is not whole."""
        return open_shard(self.folder / name_of(number), self.meta.shards[number], tokens=tokens)


def write_prepared(folder: Path, source: str, tokenizer: Tokenizer, shards: Sequence[ShardMeta]) -> PreparedMeta:
    """Says that all shards are there. Raises DataError where they hold nothing."""
    total = lambda field: sum(getattr(shard, field) for shard in shards)
    if not total("num_documents"):
        raise DataError(f"data.source={source!r} holds no text; give it some")
    meta = PreparedMeta(
        format=FORMAT,
        source=source,
        fingerprint=hashlib.sha256("".join(shard.fingerprint for shard in shards).encode()).hexdigest(),
        tokenizer=tokenizer.fingerprint,
        num_documents=total("num_documents"),
        num_tokens=total("num_tokens"),
        num_bytes=total("num_bytes"),
        num_token_bytes=total("num_token_bytes"),
        shards=tuple(shards),
    )
    meta = replace(meta, check=checksum(meta))
    write_atomically(folder / PREPARED, json.dumps(asdict(meta), indent=1) + "\n")
    return meta


def is_prepared(source: str) -> bool:
    """Whether a source is a folder of shards, ready or begun."""
    folder = local(source, "data.source")
    return (folder / PREPARED).is_file() or ((folder / TOKENIZER).is_dir() and any(folder.glob("shard-*")))


def open_prepared(source: str, field: str = "data.source") -> Prepared:
    """The folder of shards at a path, every one of which has the size that it should have; a small one is read and hashed, too.

    Raises:
        DataError: it is not whole or not ready.
    """
    folder = local(source, field)
    if not (folder / PREPARED).is_file():
        raise DataError(f"{field}={source!r} is not ready: it has shards and no {PREPARED}; let `launch.py prepare` go on there")
    try:
        meta = codec.load(PreparedMeta, fetched(folder / PREPARED, field))
    except ValueError as error:
        raise DataError(f"{error}; prepare again") from None
    if meta.format != FORMAT or meta.check != checksum(meta):
        raise DataError(f"{folder / PREPARED} is of another format, or has changed; prepare again, which keeps the shards")
    found = Prepared(folder, meta)
    small = meta.num_tokens * 4 <= VERIFY_BYTES
    names = [name for name in (INDEX, TOKENS) if small or name == INDEX]
    fetch([folder / name_of(number) / name for number in range(len(meta.shards)) for name in names], field)
    for number, shard in enumerate(meta.shards):
        found.open(number, tokens=False)
        if small and sha256_of(folder / name_of(number) / TOKENS) != shard.tokens_sha256:
            raise damaged(folder / name_of(number), f"{TOKENS} has changed")
    return found


def check_asked(prepared: Prepared, config: DataConfig, field: str = "data.source") -> None:
    """Raises DataError where the shards are not those that the config asks for."""
    meta = read_meta(prepared.folder / TOKENIZER)
    theirs = (None, None) if meta is None else (meta.tokenizer, meta.vocab_size)
    if config.tokenizer in ("byte", "bpe"):
        same = (config.tokenizer, config.size_to_learn) == theirs
    else:
        same = load_tokenizer(config.tokenizer).fingerprint == prepared.meta.tokenizer
    if not same:
        shown = f"data.tokenizer={theirs[0]!r}" + (f", data.vocab_size={theirs[1]}" if theirs[1] is not None else "")
        raise DataError(
            f"{field}={str(prepared.folder)!r} has shards of another tokenizer ({shown}) than data.tokenizer={config.tokenizer!r}"
            + (f", data.vocab_size={config.bpe_vocab_size}" if config.tokenizer == "bpe" else "")
            + f"; use data.tokenizer={prepared.folder}, or prepare with the one you want"
        )

"""A source cut into pieces of about one size, each of which becomes a shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from plait.data.config import DataError
from plait.data.remote.store import StoreLost
from plait.data.sources.readers import Span, spans
from plait.data.sources.source import Source, unreadable


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one shard is made of."""

    source: Source
    key: str
    """Says which files and bytes: names, sizes, times and span, fields and tokenizer. Another key means that a shard is to be made again."""
    num_bytes: int
    """About so many of the files."""


def cut(source: Source, shard_bytes: int, tokenizer: str) -> list[Piece]:
    """The pieces of a source, in order: files together until they have `shard_bytes`, larger ones in parts where their kind allows.

    Args:
        tokenizer: its fingerprint.

    Raises:
        DataError: a file cannot be looked at.
    """
    found: list[Piece] = []
    files: list[Path] = []
    filled = 0

    def close(files: list[Path], span: Span | None, size: int) -> None:
        if not files:
            return
        stats = [file.stat() for file in files]
        names = [file.relative_to(source.root).as_posix() if file != source.root else file.name for file in files]
        listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
        key = hashlib.sha256(json.dumps([listing, span, source.fields, tokenizer]).encode()).hexdigest()
        piece = dataclasses.replace(source, files=tuple(files), spans=(span,) * len(files), may_be_empty=True)
        found.append(Piece(piece, key, size))

    for file in source.files:
        try:
            size = file.stat().st_size
            parts = spans(file, shard_bytes) if size > shard_bytes else []
        except StoreLost:
            raise
        except OSError as error:
            raise unreadable(file, error) from None
        if len(parts) > 1:
            close(files, None, filled)
            for span in parts:
                close([file], span, size // len(parts))
            files, filled = [], 0
            continue
        if files and filled + size > shard_bytes:
            close(files, None, filled)
            files, filled = [], 0
        files.append(file)
        filled += size
    close(files, None, filled)
    if not found:
        raise DataError(f"data.source={source.name!r} has no files; give it some")
    return found

"""One shard: how it is made of a piece, and how it is opened."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from plait.configs import codec
from plait.data.cache import checksum, making
from plait.data.config import DataError
from plait.data.corpus import INDEX, TOKENS, sha256_of
from plait.data.remote.store import StoreError, StoreLost
from plait.data.remote.tree import fetch
from plait.data.shards.pieces import Piece
from plait.data.tokenising import INDEX_DTYPE, PROMPTED_DTYPE, token_dtype, tokenise
from plait.data.tokenizers.tokenizer import Tokenizer

META = "shard.json"
_RAW = "tokens.raw"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """What is known of a shard without reading it."""

    check: str | None = None
    format: int
    piece: str
    """Key of what it was made of."""
    fingerprint: str
    """Of the text."""
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_token_bytes: int
    tokens_sha256: str
    index_sha256: str


def name_of(number: int) -> str:
    """The folder of a shard."""
    return f"shard-{number:05d}"


def make_shard(piece: Piece, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenises a piece into `folder`, all of it or nothing; a folder that is there by then stays.

    Raises:
        DataError: the piece cannot be read or the folder cannot be written.
    """
    source = piece.source
    prompted = source.fields.prompt is not None
    with making(folder) as partial:
        with (partial / _RAW).open("wb") as file:
            found = tokenise(source.documents(), source.name, tokenizer, file, prompted=prompted)
        order = np.argsort(found.index["hash"], kind="stable")
        sha256 = _write_ordered(partial, found.index, order, token_dtype(tokenizer))
        (partial / _RAW).unlink()
        index = found.index[order]
        index["end"] = np.cumsum(np.diff(found.index["end"], prepend=0)[order])
        np.save(partial / INDEX, index)
        meta = ShardMeta(
            format=FORMAT,
            piece=piece.key,
            fingerprint=found.fingerprint,
            dtype=token_dtype(tokenizer).str,
            num_documents=len(index),
            num_tokens=found.num_tokens,
            num_bytes=found.num_bytes,
            num_token_bytes=found.num_token_bytes,
            tokens_sha256=sha256,
            index_sha256=sha256_of(partial / INDEX),
        )
        (partial / META).write_text(json.dumps(asdict(replace(meta, check=checksum(meta))), indent=1), "utf-8")


def read_shard(folder: Path) -> ShardMeta | None:
    """The description of a shard; None where there is none, or it is damaged."""
    try:
        meta = codec.load(ShardMeta, folder / META)
    except ValueError:
        return None
    return meta if meta.format == FORMAT and meta.check == checksum(meta) else None


def open_shard(folder: Path, meta: ShardMeta, *, tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and index of a shard, memory-mapped; the tokens are not looked at. Without `tokens` there are none of them, and where they lie
    elsewhere they are not fetched.

    Raises:
        DataError: it is cut short, or not what was written there.
    """
    try:
        size, expected = (folder / TOKENS).stat().st_size, meta.num_tokens * np.dtype(meta.dtype).itemsize
        if size != expected:
            raise damaged(folder, f"{TOKENS} has {size} bytes instead of {expected}")
        fetch([folder / INDEX, *([folder / TOKENS] if tokens else [])])
        index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False)
        dtype = np.dtype(meta.dtype)
        mapped = np.memmap(folder / TOKENS, dtype, "r") if size and tokens else np.zeros(0, dtype)
    except (DataError, StoreError, StoreLost):
        raise
    except (OSError, ValueError, EOFError) as error:
        raise damaged(folder, str(error)) from None
    if index.dtype not in (INDEX_DTYPE, PROMPTED_DTYPE) or len(index) != meta.num_documents:
        raise damaged(folder, f"{META} does not describe {INDEX}")
    return np.asarray(mapped), np.asarray(index)


def damaged(folder: Path, problem: str) -> DataError:
    """What to raise for a shard that is not what was written there."""
    return DataError(f"{folder} is not whole: {problem}; delete that folder and prepare again, which makes it alone")


def _write_ordered(folder: Path, index: np.ndarray, order: np.ndarray, dtype: np.dtype) -> str:
    """Writes the documents of the raw tokens in another order; gives the hash of the file."""
    content = hashlib.sha256()
    ends = index["end"]
    begins = ends - np.diff(ends, prepend=0)
    with (folder / TOKENS).open("wb") as file:
        if len(index):
            raw = np.memmap(folder / _RAW, dtype, "r")
            for begin, end in zip(begins[order].tolist(), ends[order].tolist()):
                part = raw[begin:end].tobytes()
                content.update(part)
                file.write(part)
    return content.hexdigest()

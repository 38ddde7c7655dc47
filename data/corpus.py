"""A corpus tokenised once into memory-mapped files, checked whenever they are used again, and split by document."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from plait.configs import codec
from plait.data.cache import checksum, making
from plait.data.config import DataError
from plait.data.packing import Documents, shuffled_order
from plait.data.progress import advance
from plait.data.sources.readers import Document
from plait.data.sources.source import Source
from plait.data.tokenising import INDEX_DTYPE, PROMPTED_DTYPE, TOKEN_DTYPES, digest_of, say_changes, token_dtype, tokenise
from plait.data.tokenizers.bpe import train_bpe
from plait.data.tokenizers.tokenizer import Tokenizer

log = logging.getLogger("plait.data")

FORMAT = 1
META, TOKENS, INDEX = "meta.json", "tokens.bin", "documents.npy"
TRAIN_BYTES = 64 << 20  # text a vocabulary is learned from; of a larger corpus, a sample of documents
VERIFY_BYTES = 1 << 30  # token files up to this size are read and hashed before they are used again


@dataclass(frozen=True, kw_only=True)
class CorpusMeta:
    """What is known of a tokenised corpus without reading it."""

    check: str | None = None  # of the other fields; None in caches that are older than it
    format: int
    source: str
    fingerprint: str  # of the text: the same on every machine
    tokenizer: str  # fingerprint
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int  # of UTF-8 text
    num_token_bytes: int  # the same, counted token by token
    tokens_sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents, and what is known of them."""

    meta: CorpusMeta
    documents: Documents


def train_tokenizer(source: Source, vocab_size: int) -> tuple[Tokenizer, str]:
    """A BPE learned from the corpus, and the fingerprint of its text.

    Of a corpus of more than 64 MiB, each document is taken with the same probability, decided by its hash.
    """
    keep = min(1.0, TRAIN_BYTES / max(source.num_bytes, 1)) * 2.0**64
    fingerprint = hashlib.sha256()

    def sample() -> Iterator[str]:
        for document in source.documents():
            digest, text = digest_of(document), learnable(document, source.name)
            fingerprint.update(digest)
            advance(0, len(text))
            if int.from_bytes(digest, "little") < keep:
                yield text

    return train_bpe(sample(), vocab_size), fingerprint.hexdigest()


def learnable(document: Document, name: str) -> str:
    """What a vocabulary is learned from. Raises DataError for ids, which have one."""
    if document.ids is not None:
        raise DataError(
            f"data.source={name!r} holds ids, and data.tokenizer=bpe is learned from text; give the tokenizer that made the ids"
        )
    return document.prompt + document.text


def load_corpus(source: Source, tokenizer: Tokenizer, cache: Path) -> Corpus:
    """The tokenised corpus: from the cache where it is there and whole, else tokenised into it.

    Any number of processes may do this at once; each writes a folder of its own and the first to rename it wins.

    Raises:
        DataError: the source cannot be read or the cache cannot be written.
    """
    folder = _folder(source, tokenizer, cache)
    if folder.exists():
        try:
            return _open(folder, tokenizer)
        except DataError as problem:
            log.warning("%s is not whole (%s); tokenising again", folder, problem)
            shutil.rmtree(folder, ignore_errors=True)
    with making(folder) as partial:
        _tokenise(source, tokenizer, partial)
    try:
        return _open(folder, tokenizer)
    except DataError as problem:  # what was there first could not be replaced
        raise DataError(f"{folder} cannot be replaced and is not whole ({problem}); delete it") from None


def find_corpus(source: Source, tokenizer: Tokenizer, cache: Path) -> Corpus | None:
    """The tokenised corpus if the cache has it whole; writes nothing."""
    try:
        return _open(_folder(source, tokenizer, cache), tokenizer)
    except DataError:
        return None


def split(documents: Documents, val_fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Training and validation documents.

    Held out are whole documents, in the order of their salted hashes, until they have `val_fraction` of the tokens. So the
    choice does not hang on file names or their order, and copies of a document are on the same side. Where that would be
    more than twice the share asked for (documents few or large), the last `val_fraction` of every document is held out, unless documents
    have prompts.
    """
    if val_fraction == 0:
        return documents, documents.take(np.arange(0))
    goal = documents.num_tokens * val_fraction
    order = shuffled_order(documents.hashes, "split", seed)
    hashes, total = documents.hashes[order], np.cumsum(documents.lengths[order])
    count = int(np.searchsorted(total, goal)) + 1  # the fewest that reach the goal
    count += int(np.sum(hashes[count:] == hashes[count - 1]))  # copies stand together in the order
    if total[count - 1] <= 2 * goal or documents.given is not None:
        return documents.take(np.sort(order[count:])), documents.take(order[:count])
    held = np.minimum(np.ceil(documents.lengths * val_fraction).astype(np.int64), documents.lengths - 1)
    train = replace(documents, lengths=documents.lengths - held)
    val = replace(documents, starts=documents.starts + train.lengths, lengths=held)
    return train, val.take(np.flatnonzero(held))


def _tokenise(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    prompted = source.fields.prompt is not None
    with (folder / TOKENS).open("wb") as file:
        found = tokenise(source.documents(), source.name, tokenizer, file, prompted=prompted)
    if not len(found.index):
        raise DataError(
            f"data.source={source.name!r}: the tokenizer ({tokenizer.changes}) leaves nothing of its text; use another"
        )
    say_changes(tokenizer, found.num_bytes, found.num_token_bytes)
    np.save(folder / INDEX, found.index)
    meta = CorpusMeta(
        format=FORMAT,
        source=source.name,
        fingerprint=found.fingerprint,
        tokenizer=tokenizer.fingerprint,
        dtype=token_dtype(tokenizer).str,
        num_documents=len(found.index),
        num_tokens=found.num_tokens,
        num_bytes=found.num_bytes,
        num_token_bytes=found.num_token_bytes,
        tokens_sha256=found.tokens_sha256,
        index_sha256=sha256_of(folder / INDEX),
    )
    (folder / META).write_text(json.dumps(asdict(replace(meta, check=checksum(meta))), indent=1), "utf-8")


def _folder(source: Source, tokenizer: Tokenizer, cache: Path) -> Path:
    key = f"{FORMAT}\0{source.root.resolve()}\0{source.signature()}\0{tokenizer.fingerprint}"
    return cache / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _open(folder: Path, tokenizer: Tokenizer) -> Corpus:
    """The corpus in a folder. Raises DataError, saying why, where its files are not those that were written for this tokenizer."""
    try:
        meta = codec.load(CorpusMeta, folder / META)
        if meta.format != FORMAT or meta.tokenizer != tokenizer.fingerprint or meta.dtype not in TOKEN_DTYPES:
            raise DataError(f"{META} is of another format or tokenizer")
        if meta.check not in (None, checksum(meta)):
            raise DataError(f"{META} has changed")
        size, expected = (folder / TOKENS).stat().st_size, meta.num_tokens * np.dtype(meta.dtype).itemsize
        if size != expected:
            raise DataError(f"{TOKENS} has {size} bytes instead of {expected}")
        if sha256_of(folder / INDEX) != meta.index_sha256:
            raise DataError(f"{INDEX} has changed")
        if size <= VERIFY_BYTES and sha256_of(folder / TOKENS) != meta.tokens_sha256:
            raise DataError(f"{TOKENS} has changed")
        tokens = np.asarray(np.memmap(folder / TOKENS, np.dtype(meta.dtype), "r"))
        index = np.load(folder / INDEX, allow_pickle=False)
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(str(error)) from None
    if (
        index.dtype not in (INDEX_DTYPE, PROMPTED_DTYPE)
        or len(index) != meta.num_documents
        or min(meta.num_documents, meta.num_bytes) < 1
    ):
        raise DataError(f"{META} does not describe {INDEX}")
    ends = index["end"].astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if lengths.min() < 1 or ends[-1] != meta.num_tokens:
        raise DataError(f"{META} does not describe {INDEX}")
    given = index["given"].astype(np.int64) if index.dtype == PROMPTED_DTYPE else None
    if given is not None and ((given < 0) | (given >= lengths)).any():
        raise DataError(f"{META} does not describe {INDEX}")
    return Corpus(meta, Documents(tokens, ends - lengths, lengths, index["hash"].astype(np.uint64), given))


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A corpus tokenised once into memory-mapped files, checked whenever they are used again, and split by document."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from plait.configs import codec
from plait.data.bpe import train_bpe
from plait.data.cache import checksum, making
from plait.data.config import DataError
from plait.data.packing import Documents, shuffled_order
from plait.data.readers import Document, short
from plait.data.sources import Source
from plait.data.tokenizer import Tokenizer

log = logging.getLogger("plait.data")

FORMAT = 1
META, TOKENS, INDEX = "meta.json", "tokens.bin", "documents.npy"
TOKEN_DTYPES = ("<u2", "<u4")
INDEX_DTYPE = np.dtype([("end", "<i8"), ("hash", "<u8")])  # one past the document's last token; hash of its text
PROMPTED_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("given", "<i8")])  # also how many tokens the prompt has
ENCODE_CHARS = 4 << 20  # text encoded at a time
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
            digest = _hash(document)
            fingerprint.update(digest)
            if int.from_bytes(digest, "little") < keep:
                yield document.prompt + document.text

    return train_bpe(sample(), vocab_size), fingerprint.hexdigest()


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
    dtype = np.dtype(TOKEN_DTYPES[tokenizer.vocab_size > 1 << 16])
    content, fingerprint = hashlib.sha256(), hashlib.sha256()
    ends, hashes, given = [], [], []
    num_tokens = num_bytes = num_token_bytes = 0
    with (folder / TOKENS).open("wb") as file:
        for documents in _groups(source.documents()):
            digests = [_hash(document) for document in documents]
            answers = tokenizer.encode_batch([document.text for document in documents])
            prompts = _prompts(source, tokenizer, documents)
            for document, digest, before, answer in zip(documents, digests, prompts, answers):
                if len(answer) == 0:  # a tokenizer that normalises can leave nothing of a text
                    continue
                text, ids = document.prompt + document.text, np.concatenate([before, answer])
                if tokenizer.eos_id in ids:
                    raise DataError(
                        f"data.source={source.name!r}: a text holds the end token {tokenizer.token_name(tokenizer.eos_id)!r} as a word "
                        f"({short(text)!r}); name another token as eos_token in tokenizer_config.json"
                    )
                raw = ids.astype(dtype).tobytes()
                file.write(raw)
                content.update(raw)
                num_tokens += len(ids)
                num_bytes += len(text.encode("utf-8"))
                num_token_bytes += tokenizer.num_bytes(ids)
                ends.append(num_tokens)
                hashes.append(int.from_bytes(digest, "little"))
                given.append(len(before))
            fingerprint.update(b"".join(digests))
    if not ends:
        raise DataError(
            f"data.source={source.name!r}: the tokenizer ({tokenizer.changes}) leaves nothing of its text; use another"
        )
    if tokenizer.changes:
        share = num_token_bytes / num_bytes
        log.warning(
            "the tokenizer changes the text (%s): its tokens stand for %.4f of the bytes, and bits per byte counts those of the tokens",
            tokenizer.changes,
            share,
        )
    elif num_bytes != num_token_bytes:
        raise DataError(
            f"data.source={source.name!r}: {num_token_bytes} bytes of tokens stand for {num_bytes} bytes of text, so that the tokenizer "
            "adds to the text or drops some; use another"
        )
    index = np.empty(len(ends), INDEX_DTYPE if source.fields.prompt is None else PROMPTED_DTYPE)
    index["end"], index["hash"] = ends, np.array(hashes, np.uint64)
    if source.fields.prompt is not None:
        index["given"] = given
    np.save(folder / INDEX, index)
    meta = CorpusMeta(
        format=FORMAT,
        source=source.name,
        fingerprint=fingerprint.hexdigest(),
        tokenizer=tokenizer.fingerprint,
        dtype=dtype.str,
        num_documents=len(ends),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_token_bytes=num_token_bytes,
        tokens_sha256=content.hexdigest(),
        index_sha256=_sha256(folder / INDEX),
    )
    (folder / META).write_text(json.dumps(asdict(replace(meta, check=checksum(meta))), indent=1), "utf-8")


def _prompts(source: Source, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Ids of each document's prompt."""
    if source.fields.prompt is None:
        return [np.zeros(0, np.int32)] * len(documents)
    return tokenizer.encode_batch([document.prompt for document in documents])


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about ENCODE_CHARS characters."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.prompt) + len(document.text)
        if size >= ENCODE_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


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
        if _sha256(folder / INDEX) != meta.index_sha256:
            raise DataError(f"{INDEX} has changed")
        if size <= VERIFY_BYTES and _sha256(folder / TOKENS) != meta.tokens_sha256:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(document: Document) -> bytes:
    whole = f"{document.prompt}\0{document.text}" if document.prompt else document.text
    return hashlib.blake2b(whole.encode("utf-8"), digest_size=8).digest()

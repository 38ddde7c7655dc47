"""Documents to tokens in a file, with an index of the documents."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from plait.data.config import DataError
from plait.data.progress import advance
from plait.data.sources.readers import Document, short
from plait.data.tokenizers.tokenizer import Tokenizer

log = logging.getLogger("plait.data")

TOKEN_DTYPES = ("<u2", "<u4")
INDEX_DTYPE = np.dtype([("end", "<i8"), ("hash", "<u8")])  # one past the document's last token; hash of its text
PROMPTED_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("given", "<i8")])  # also how many tokens the prompt has
ENCODE_CHARS = 4 << 20  # text encoded at a time


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """What became of some documents."""

    index: np.ndarray
    """A row a document, of `INDEX_DTYPE` or `PROMPTED_DTYPE`."""
    tokens_sha256: str
    fingerprint: str
    """Of the text: the same on every machine."""
    num_tokens: int
    num_bytes: int
    """Of UTF-8 text."""
    num_token_bytes: int
    """The same, counted token by token."""


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """What a token is kept as: 2 bytes up to 65,536 ids, else 4."""
    return np.dtype(TOKEN_DTYPES[tokenizer.vocab_size > 1 << 16])


def tokenise(documents: Iterable[Document], name: str, tokenizer: Tokenizer, file: IO[bytes], *, prompted: bool) -> Tokenised:
    """Writes the tokens of the documents to `file`, one document after another. Those of which nothing is left are left out.

    Args:
        documents: texts, or ids, which are cut at end tokens; start and end tokens around them are taken away.
        name: of the source, for messages.
        prompted: whether documents have prompts.

    Raises:
        DataError: a text or id that the tokenizer does not have.
    """
    dtype = token_dtype(tokenizer)
    content, fingerprint = hashlib.sha256(), hashlib.sha256()
    ends, hashes, given = [], [], []
    num_tokens = num_bytes = num_token_bytes = 0
    for group in _groups(_parted(documents, name, tokenizer)):
        before, bytes_before = num_tokens, num_bytes
        digests = [digest_of(document) for document in group]
        for document, digest, prompt, answer in zip(group, digests, *_encoded(group, tokenizer, prompted)):
            if len(answer) == 0:  # a tokenizer that normalises can leave nothing of a text
                continue
            ids = np.concatenate([prompt, answer]) if len(prompt) else answer
            if document.ids is None and (ids == tokenizer.eos_id).any():
                raise DataError(
                    f"data.source={name!r}: a text holds the end token {tokenizer.token_name(tokenizer.eos_id)!r} as a word "
                    f"({short(document.prompt + document.text)!r}); name another token as eos_token in tokenizer_config.json"
                )
            raw = ids.astype(dtype).tobytes()
            file.write(raw)
            content.update(raw)
            num_tokens += len(ids)
            own = tokenizer.num_bytes(ids)
            num_bytes += own if document.ids is not None else len((document.prompt + document.text).encode("utf-8"))
            num_token_bytes += own
            ends.append(num_tokens)
            hashes.append(int.from_bytes(digest, "little"))
            given.append(len(prompt))
        fingerprint.update(b"".join(digests))
        advance(num_tokens - before, num_bytes - bytes_before)
    if not tokenizer.changes and num_bytes != num_token_bytes:
        raise DataError(
            f"data.source={name!r}: {num_token_bytes} bytes of tokens stand for {num_bytes} bytes of text, so that the tokenizer "
            "adds to the text or drops some; use another"
        )
    index = np.empty(len(ends), PROMPTED_DTYPE if prompted else INDEX_DTYPE)
    index["end"], index["hash"] = ends, np.array(hashes, np.uint64)
    if prompted:
        index["given"] = given
    return Tokenised(
        index=index,
        tokens_sha256=content.hexdigest(),
        fingerprint=fingerprint.hexdigest(),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_token_bytes=num_token_bytes,
    )


def say_changes(tokenizer: Tokenizer, num_bytes: int, num_token_bytes: int) -> None:
    """Says what the tokenizer does to a text, where it does something."""
    if tokenizer.changes and num_bytes:
        log.warning(
            "the tokenizer changes the text (%s): its tokens stand for %.4f of the bytes, and bits per byte counts those of the tokens",
            tokenizer.changes,
            num_token_bytes / num_bytes,
        )


def digest_of(document: Document) -> bytes:
    """The 8 bytes by which a document is known, whatever its place."""
    if document.ids is not None:
        return hashlib.blake2b(document.ids.astype("<i4").tobytes(), digest_size=8).digest()
    whole = f"{document.prompt}\0{document.text}" if document.prompt else document.text
    return hashlib.blake2b(whole.encode("utf-8"), digest_size=8).digest()


def _parted(documents: Iterable[Document], name: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents, those of ids cut at end tokens and without start tokens."""
    for document in documents:
        if document.ids is None:
            yield document
            continue
        ids = document.ids
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise DataError(
                f"data.source={name!r} holds the id {wrong}, and the {tokenizer.vocab_size} ids of data.tokenizer end at "
                f"{tokenizer.vocab_size - 1}; give the tokenizer that made the ids"
            )
        for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1):
            own = part[part != tokenizer.eos_id]
            own = own[1:] if len(own) and own[0] == tokenizer.bos_id else own
            if len(own):
                yield document._replace(ids=own.astype(np.int32))


def _encoded(group: Sequence[Document], tokenizer: Tokenizer, prompted: bool) -> tuple[list[np.ndarray], Sequence[np.ndarray]]:
    """Ids of each document's prompt and of its text."""
    texts = iter(tokenizer.encode_batch([document.text for document in group if document.ids is None]))
    answers = [next(texts) if document.ids is None else document.ids for document in group]
    prompts = (
        tokenizer.encode_batch([document.prompt for document in group]) if prompted else [np.zeros(0, np.int32)] * len(group)
    )
    return prompts, answers


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about ENCODE_CHARS characters."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.prompt) + len(document.text) + (0 if document.ids is None else 4 * len(document.ids))
        if size >= ENCODE_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group

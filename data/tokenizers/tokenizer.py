"""Text to token ids and back, with the number of bytes behind every id."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from plait.configs.files import write_atomically
from plait.data.cache import checksum
from plait.data.config import BYTE_VOCAB

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerMeta:
    """What stands beside a tokenizer.json that we wrote."""

    check: str | None = None  # of the other fields; None in folders that are older than it
    kind: Literal["byte", "json"]
    eos: str
    bos: str
    fingerprint: str | None = None  # None in folders that are older than it
    corpus: str | None = None  # fingerprint of the text it was learned from
    tokenizer: str | None = None  # data.tokenizer and data.vocab_size that asked for it
    vocab_size: int | None = None


class Tokenizer(ABC):
    """What turns text into ids.

    Attributes:
        kind: of the description that is kept.
        vocab_size: one more than the largest id.
        eos_id: the token after a document (its cost is part of a document's code length; it stands for no bytes).
        bos_id: the token before a document; `eos_id` where the vocabulary has no own.
        bytes_per_token: int32 [vocab_size], bytes of UTF-8 text each id stands for; 0 for special tokens.
        changes: what in it adds to a text, drops or changes some; empty where the lengths of a text's tokens add up to its bytes.
        fingerprint: sha256 of everything that decides the ids.

    With `nll` in nats per target, bits per byte is `sum(nll * mask) / log(2) / sum(bytes_per_token[targets] * mask)`.
    """

    kind: ClassVar[Literal["byte", "json"]]
    vocab_size: int
    eos_id: int
    bos_id: int
    bytes_per_token: np.ndarray
    changes: str
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]. No special token is added, and none is recognised in the text.

        Raises:
            DataError: the tokenizer cannot read some text.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; special tokens give none, bytes that are not UTF-8 give U+FFFD."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for; none for a special token."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """The name of a special token."""

    @abstractmethod
    def to_json(self) -> str:
        """The tokenizer.json, readable by other libraries."""

    def save(
        self, folder: str | Path, *, corpus: str | None = None, tokenizer: str | None = None, vocab_size: int | None = None
    ) -> None:
        """Writes tokenizer.json and, when that is whole, its `TokenizerMeta` to `folder`."""
        meta = TokenizerMeta(
            kind=self.kind,
            eos=self.token_name(self.eos_id),
            bos=self.token_name(self.bos_id),
            fingerprint=self.fingerprint,
            corpus=corpus,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
        )
        write_atomically(Path(folder) / TOKENIZER_FILE, self.to_json())
        write_atomically(Path(folder) / META_FILE, json.dumps(asdict(replace(meta, check=checksum(meta))), indent=1))

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n]."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_special(self, text: str) -> np.ndarray:
        """Ids of one text in which the names of special tokens stand for them, as in a chat from a template, int32 [n]."""

    def num_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text behind these ids."""
        return int(self.bytes_per_token[np.asarray(ids, np.int64)].sum())

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Each id as a label for a picture: its text, its name if special, `<E2>` for a byte that is no character."""
        return [self._label(int(token)) for token in ids]

    def _label(self, token: int) -> str:
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8") if raw else self.token_name(token)
        except UnicodeDecodeError:
            return "".join(chr(b) if 32 <= b < 127 else f"<{b:02X}>" for b in raw)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes themselves, 256 is end-of-text."""

    kind = "byte"
    vocab_size = BYTE_VOCAB
    eos_id = 256
    bos_id = 256
    bytes_per_token = np.array([1] * 256 + [0], np.int32)
    changes = ""
    fingerprint = hashlib.sha256(b"plait byte tokenizer 1").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def encode_special(self, text: str) -> np.ndarray:
        parts = [self.encode(part) for part in text.split(END_OF_TEXT)]
        return np.concatenate([parts[0], *([self.eos_id, *part] for part in parts[1:])]).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def token_name(self, token: int) -> str:
        return END_OF_TEXT

    def to_json(self) -> str:
        vocab = {char: byte for byte, char in enumerate(BYTE_CHARS)}
        tok = byte_level(models.BPE(vocab=vocab, merges=[]))
        tok.add_special_tokens([END_OF_TEXT])
        return tok.to_str()


def _byte_chars() -> list[str]:
    """The character that byte-level vocabularies write for each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


BYTE_CHARS = _byte_chars()


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """The library's tokenizer of a model whose characters are `BYTE_CHARS`, text cut into words as GPT-2 does."""
    tok = tokenizers.Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok

"""Tokenizers read from a tokenizer.json: which can be used, what each of their tokens stands for, and what they do to a text."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tokenizers

from plait.configs.files import parse_json
from plait.data.config import DataError
from plait.data.tokenizers.tokenizer import BYTE_CHARS, END_OF_TEXT, TOKENIZER_FILE, Tokenizer

T = TypeVar("T")

# Names that published tokenizers give their end token, tried where no configuration beside the tokenizer names it.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>")
MOST_IDS = 1 << 22
"""Ids are below this: arrays and the embedding have a row for each, used or not."""
PIECE_CHARS = 1 << 20  # longer texts are encoded in pieces of about this length
BYTE_OF = {char: byte for byte, char in enumerate(BYTE_CHARS)}
RARE = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}) - frozenset(b"\t\n\r")
"""Bytes of control characters, of planes of Unicode without characters, and of no text at all: published vocabularies lack some (SmolLM2)."""
_KEEP_TEXT = {"Sequence", "ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength"}
_PROBE = ["Plain words, 1790.", "  naïve\t日本 \u0301🙂\r\n"]


class JsonTokenizer(Tokenizer):
    """A tokenizer.json in which each token stands for fixed bytes: byte-level BPE, or SentencePiece with byte fallback.

    SentencePiece vocabularies add a space before the text, so that their byte counts can be over by one a document, and normalisers
    change or drop text: `changes` names what does, and bytes are then counted as those that the tokens stand for.

    Args:
        text: content of the tokenizer.json.
        eos: name of the end token; None takes the special token with a usual name.
        bos: name of the start token; None takes the end token.
        where: for error messages.

    Raises:
        DataError: not a tokenizer, of another kind, or without these tokens.
    """

    kind = "json"

    def __init__(self, text: str, *, eos: str | None, bos: str | None = None, where: str = TOKENIZER_FILE) -> None:
        self._where = where
        self.text = text
        self._library("is not a tokenizer.json", lambda: parse_json(text))
        self._tok = self._library("is not a tokenizer.json", lambda: tokenizers.Tokenizer.from_str(text))
        _check_ids(self._tok.get_vocab(with_added_tokens=True), where)  # before the library counts up to the largest
        content = json.loads(self._tok.to_str())  # with the fields that older files lack
        self._eos = _usual_end(content, where) if eos is None else eos
        self._bos = bos or self._eos
        if plain := [token for token in content["added_tokens"] if token["content"] in self._ends and not token["special"]]:
            for token in plain:  # a document that spells them must not end there
                token["special"] = True
            self._tok = self._library("is not a tokenizer.json", lambda: tokenizers.Tokenizer.from_str(json.dumps(content)))
        self._tok.no_padding()
        self._tok.no_truncation()
        self._tok.encode_special_tokens = True  # nor one that spells another special token
        vocab = self._tok.get_vocab(with_added_tokens=True)
        self._byte_level = "ByteLevel" in [
            part["type"] for name in ("pre_tokenizer", "normalizer") for part in _parts(content[name])
        ]
        _check_ends(vocab, self._ends, where)
        lacking = _check_bytes(content, vocab, self._byte_level, where)
        self._lacking = re.compile(b"[" + re.escape(bytes(lacking)) + b"]") if lacking else None
        self.eos_id, self.bos_id = vocab[self._eos], vocab[self._bos]
        self.vocab_size = max(vocab.values()) + 1
        self._names = {i: name for name, i in vocab.items()}
        added = self._tok.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special} | {self.eos_id, self.bos_id}
        self._added = added.keys() - self._special
        self._space = next((p["replacement"] for p in _parts(content["decoder"]) if p["type"] == "Metaspace"), "▁")
        self.changes = ", ".join(_changes(content, self._byte_level))
        self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        self.bytes_per_token = np.array([len(piece) for piece in self._pieces], np.int32)
        self.fingerprint = hashlib.sha256(f"{self._eos}\0{self._bos}\0{text}".encode()).hexdigest()
        self.encode_batch(_PROBE)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            if self._lacking is not None and (found := self._lacking.search(text.encode())):
                raise DataError(
                    f"{self._where} has no token for the byte 0x{found[0].hex()}, which a text has at byte {found.start()}; take it out there"
                )
        pieces = [[text] if self.changes else split_long(text) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encodings = self._library("cannot read a text", lambda: self._tok.encode_batch_fast(flat, add_special_tokens=False))
        ids = iter([np.array(encoding.ids, np.int32) for encoding in encodings])
        return [np.concatenate([next(ids) for _ in text]) for text in pieces]

    def encode_special(self, text: str) -> np.ndarray:
        encoding = self._library("cannot read a text", lambda: self._with_special.encode(text, add_special_tokens=False))
        return np.array(encoding.ids, np.int32)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, where it recognises special tokens."""
        return tokenizers.Tokenizer.from_str(self._tok.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        kept = [token for token in map(int, ids) if token not in self._special]
        if self._byte_level:
            return b"".join(self._pieces[token] for token in kept).decode("utf-8", errors="replace")
        return self._tok.decode(kept)

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def token_name(self, token: int) -> str:
        return self._names.get(token, f"<unused {token}>")

    def to_json(self) -> str:
        return self.text

    @property
    def _ends(self) -> tuple[str, str]:
        return self._eos, self._bos

    def _library(self, problem: str, call: Callable[[], T]) -> T:
        """What `call` gives; the library raises bare Exceptions, and panics that are not even those."""
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise DataError(f"{self._where} {problem}: {error}; use the file that `tokenizers` writes") from None

    def _piece(self, token: int) -> bytes:
        name = self._names.get(token)
        if name is None or token in self._special:
            return b""
        if token in self._added:
            return name.encode()
        if self._byte_level:
            return bytes(BYTE_OF[char] for char in name) if all(char in BYTE_OF for char in name) else name.encode()
        if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(match[1])
        return name.replace(self._space, " ").encode()


def split_long(text: str, limit: int = PIECE_CHARS) -> list[str]:
    """The text in pieces of about `limit` characters, cut before a space that follows a non-space.

    No pre-tokenizer of the byte-level family lets a word run across such a place, so that the tokens are those of the
    whole text; but the pieces are encoded in parallel and in little memory.
    """
    pieces, start = [], 0
    while len(text) - start > limit and (cut := _CUT.search(text, start + limit)):
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


_CUT = re.compile(r"(?<=\S) ")


def _parts(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A component of a tokenizer.json, and where it is a sequence those in it."""
    if component is None:
        return
    yield component
    for inner in (name for name in ("normalizers", "pretokenizers", "decoders") if name in component):
        for one in component[inner]:
            yield from _parts(one)


def _usual_end(content: Mapping[str, Any], where: str) -> str:
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    found = next((name for name in END_NAMES if name in special), None)
    if found is None:
        raise DataError(
            f"{where} does not say which token ends a text (special tokens: {', '.join(special[:8]) or 'none'}); "
            'put {"eos_token": "<its name>"} in tokenizer_config.json beside it'
        )
    return found


def _check_ids(vocab: Mapping[str, int], where: str) -> None:
    """Raises DataError unless each id is that of one token, and none is huge."""
    names: dict[int, str] = {}
    for name, i in vocab.items():
        if i >= MOST_IDS:
            raise DataError(f"{where} gives {name!r} the id {i}; ids must be below {MOST_IDS}: number its tokens from 0 on")
        if (other := names.setdefault(i, name)) != name:
            raise DataError(f"{where} gives both {other!r} and {name!r} the id {i}; give each token its own")


def _check_ends(vocab: Mapping[str, int], ends: tuple[str, str], where: str) -> None:
    """Raises DataError for an end or start token that is not there."""
    for name in ends:
        if name not in vocab:
            raise DataError(
                f"{where} has no token {name!r}; name its end-of-text token as eos_token in tokenizer_config.json beside it"
            )


def _check_bytes(content: Mapping[str, Any], vocab: Mapping[str, int], byte_level: bool, where: str) -> list[int]:
    """The bytes without a token, of `RARE`. Raises DataError unless every text without them has tokens, always the same ones, and their
    names say which bytes they stand for."""
    model = content["model"]
    if byte_level:
        missing = [byte for byte, char in enumerate(BYTE_CHARS) if char not in vocab]
    elif model.get("byte_fallback"):
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    else:
        raise DataError(
            f"{where} is neither byte-level nor has byte fallback, so some text has no tokens and bits per byte no meaning; "
            "use such a tokenizer, or data.tokenizer=bpe"
        )
    if common := [byte for byte in missing if byte not in RARE]:
        raise DataError(
            f"{where} has no token for {len(common)} of the 256 bytes (0x{common[0]:02x} is the first), so some text has no tokens; "
            "train it with the whole byte alphabet, or use data.tokenizer=bpe"
        )
    for name in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(name):
            raise DataError(
                f"{where} marks its tokens with {name}={model[name]!r}, which is no text; use a tokenizer that does not"
            )
    if model.get("dropout"):
        raise DataError(f"{where} has dropout={model['dropout']}, so that a text has other tokens each time; set it to null")
    if byte_level and "ByteLevel" not in [part["type"] for part in _parts(content["decoder"])]:
        raise DataError(f"{where} is byte-level without the decoder ByteLevel, so its ids give no text; add that decoder")
    return missing


def _changes(content: Mapping[str, Any], byte_level: bool) -> Iterator[str]:
    """What in a tokenizer.json adds to a text, drops or changes some."""
    for part in _parts(content["normalizer"]):
        if part["type"] not in ("Sequence", "ByteLevel"):
            yield f"normalizer {part['type']}"
    if not byte_level:
        yield "spaces as marks"
    for part in _parts(content["pre_tokenizer"]):
        if part.get("add_prefix_space"):
            yield f"{part['type']} with add_prefix_space"
        elif part["type"] not in _KEEP_TEXT or part.get("behavior") == "Removed":
            yield f"pre-tokenizer {part['type']}"
    for token in content["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            yield f"token {token['content']!r}, which takes spaces beside it"

"""Text to token ids and back, with the exact number of bytes behind every id."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from plait.data.config import BYTE_VOCAB, DataError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"
# Names that published tokenizers give their end token, tried where no configuration beside the tokenizer names it.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>")
PIECE_CHARS = 1 << 20  # longer texts are encoded in pieces of about this length


class Tokenizer(ABC):
    """What turns text into ids.

    Attributes:
        vocab_size: one more than the largest id.
        eos_id: the token after a document (its cost is part of a document's code length; it stands for no bytes).
        bos_id: the token before a document; `eos_id` where the vocabulary has no own.
        bytes_per_token: int32 [vocab_size], bytes of UTF-8 text each id stands for; 0 for special tokens.
        exact_bytes: whether the lengths of a text's tokens always add up to its bytes.
        fingerprint: sha256 of everything that decides the ids.

    With `nll` in nats per target, bits per byte is `sum(nll * mask) / log(2) / sum(bytes_per_token[targets] * mask)`.
    """

    vocab_size: int
    eos_id: int
    bos_id: int
    bytes_per_token: np.ndarray
    exact_bytes: bool
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]. No special token is added, and none is recognised in the text."""

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
    def save(self, folder: str | Path, **meta: object) -> None:
        """Writes tokenizer.json (readable by other libraries) and a description to `folder`; JSON only."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n]."""
        return self.encode_batch([text])[0]

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

    vocab_size = BYTE_VOCAB
    eos_id = 256
    bos_id = 256
    bytes_per_token = np.array([1] * 256 + [0], np.int32)
    exact_bytes = True
    fingerprint = hashlib.sha256(b"plait byte tokenizer 1").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def token_name(self, token: int) -> str:
        return END_OF_TEXT

    def save(self, folder: str | Path, **meta: object) -> None:
        vocab = {char: byte for byte, char in enumerate(BYTE_CHARS)}
        tok = _byte_level(models.BPE(vocab=vocab, merges=[]))
        tok.add_special_tokens([END_OF_TEXT])
        _write(folder, tok.to_str(), {**meta, "kind": "byte", "eos": END_OF_TEXT, "bos": END_OF_TEXT})


class JsonTokenizer(Tokenizer):
    """A tokenizer.json in which each token stands for fixed bytes: byte-level BPE, or SentencePiece with byte fallback.

    SentencePiece vocabularies add a space before the text, so that their byte counts can be over by one a document
    (`exact_bytes` is False); byte-level ones are exact unless they normalise the text.

    Args:
        text: content of the tokenizer.json.
        eos: name of the end token.
        bos: name of the start token; None takes `eos`.
        where: for error messages.

    Raises:
        DataError: not a tokenizer, of another kind, or without these tokens.
    """

    def __init__(self, text: str, *, eos: str, bos: str | None = None, where: str = TOKENIZER_FILE) -> None:
        try:
            self._tok = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where} is not a tokenizer.json: {error}; use the file that `tokenizers` writes") from None
        self._tok.no_padding()
        self._tok.no_truncation()
        self._tok.encode_special_tokens = True  # a document that spells <|endoftext|> must not end there
        vocab = self._tok.get_vocab(with_added_tokens=True)
        for name in (eos, bos or eos):
            if name not in vocab:
                raise DataError(
                    f"{where} has no token {name!r}; name its end-of-text token as eos_token in tokenizer_config.json beside it"
                )
        content = json.loads(text)
        self.text = text
        self.eos, self.bos = eos, bos or eos
        self.eos_id, self.bos_id = vocab[eos], vocab[self.bos]
        self.vocab_size = max(vocab.values()) + 1
        self._byte_level = "ByteLevel" in _types(content.get("decoder"))
        if not self._byte_level and "<0x00>" not in vocab:
            raise DataError(
                f"{where} is neither byte-level nor has byte fallback, so some text has no tokens and bits per byte no meaning; "
                "use such a tokenizer, or data.tokenizer=bpe"
            )
        self._names = {i: name for name, i in vocab.items()}
        self._special = {i for i, token in self._tok.get_added_tokens_decoder().items() if token.special} | {
            self.eos_id,
            self.bos_id,
        }
        self._added = {i for i in self._tok.get_added_tokens_decoder() if i not in self._special}
        self.exact_bytes = self._byte_level and content.get("normalizer") in (None, {"type": "Sequence", "normalizers": []})
        self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        self.bytes_per_token = np.array([len(piece) for piece in self._pieces], np.int32)
        self.fingerprint = hashlib.sha256(f"{self.eos}\0{self.bos}\0{text}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [split_long(text) if self._byte_level else [text] for text in texts]
        flat = self._tok.encode_batch_fast([p for text in pieces for p in text], add_special_tokens=False)
        ids = iter([np.array(encoding.ids, np.int32) for encoding in flat])
        return [np.concatenate([next(ids) for _ in text]) for text in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tok.decode([token for token in map(int, ids) if token not in self._special])

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def token_name(self, token: int) -> str:
        return self._names.get(token, f"<unused {token}>")

    def save(self, folder: str | Path, **meta: object) -> None:
        _write(folder, self.text, {**meta, "kind": "json", "eos": self.eos, "bos": self.bos})

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
        return name.replace("▁", " ").encode()


def _byte_chars() -> list[str]:
    """The character that byte-level vocabularies write for each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


BYTE_CHARS = _byte_chars()
BYTE_OF = {char: byte for byte, char in enumerate(BYTE_CHARS)}


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


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens learned from the texts (fewer where they hold too little)."""
    if vocab_size < BYTE_VOCAB:
        raise DataError(f"data.vocab_size={vocab_size} must be at least {BYTE_VOCAB}; use {BYTE_VOCAB} or more")
    tok = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(BYTE_CHARS), show_progress=False
    )
    tok.train_from_iterator((piece for text in texts for piece in split_long(text)), trainer)
    return JsonTokenizer(tok.to_str(), eos=END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at a path: a tokenizer.json, a folder that has one, or a run folder.

    The end token is the one named by our own description or by a tokenizer_config.json beside it, else a usual name.

    Raises:
        DataError: nothing there, or not usable.
    """
    path = Path(path).expanduser()
    candidates = [path] if path.is_file() else [path / TOKENIZER_FILE, path / "tokenizer" / TOKENIZER_FILE]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise DataError(f"data.tokenizer={str(path)!r} is no tokenizer.json and has none; use byte, bpe, or the path of one")
    meta = read_meta(file.parent)
    if meta.get("kind") == "byte":
        return ByteTokenizer()
    try:
        text = file.read_text("utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise DataError(f"{file} is not a tokenizer.json: {error}; use the file that `tokenizers` writes") from None
    eos, bos = meta.get("eos"), meta.get("bos")
    if eos is None:
        beside = _read_json(file.parent / "tokenizer_config.json")
        eos, bos = (_token_name(beside.get(key)) for key in ("eos_token", "bos_token"))
    if eos is None:
        special = [token["content"] for token in content.get("added_tokens", []) if token.get("special")]
        eos = next((name for name in END_NAMES if name in special), None)
        if eos is None:
            raise DataError(
                f"{file} does not say which token ends a text (special tokens: {', '.join(special[:8]) or 'none'}); "
                'put {"eos_token": "<its name>"} in tokenizer_config.json beside it'
            )
    return JsonTokenizer(text, eos=eos, bos=bos, where=str(file))


def read_meta(folder: Path) -> dict:
    """What `save` wrote about the tokenizer in this folder; empty for one that is not ours."""
    return _read_json(folder / META_FILE)


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}; restore it, or delete it") from None
    return content if isinstance(content, dict) else {}


def _token_name(value: object) -> str | None:
    return value.get("content") if isinstance(value, dict) else value  # type: ignore[return-value]


def _types(part: dict | None) -> set[str]:
    """The type names in a tokenizer.json component and in the sequence it may be."""
    if not part:
        return set()
    inner = [part, *part.get("decoders", []), *part.get("pretokenizers", [])]
    return {item.get("type", "") for item in inner}


def _write(folder: str | Path, text: str, meta: dict) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (TOKENIZER_FILE, text),
        (META_FILE, json.dumps(meta, indent=1)),
    ):  # the description last: it says complete
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{name}.", delete=False, encoding="utf-8") as partial:
            partial.write(content)
        Path(partial.name).replace(folder / name)

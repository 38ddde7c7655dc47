"""The tokenizer.json that the metadata of a GGUF file describe, and the configuration beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from plait.data.tokenizers.tokenizer import byte_level
from plait.train.convert.gguf.names import ENDS
from plait.train.convert.weights import ConvertError

KEY = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_MARK = "▁"
"""What SentencePiece writes for a space."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Words as GPT-2 cuts them, in what `before` leaves."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_alone])


WORDS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _words,
    "gpt2": _words,
    "smollm": lambda: _words(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "llama-v3": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
}
"""How text is cut into words before its bytes are merged, by `tokenizer.ggml.pre`."""
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3")
"""Those in which a word that is a token is not merged from its parts."""
_COMPOSED = ("qwen2",)
"""Those that compose characters first (NFC)."""


class _Vocabulary:
    """The tokens of a file, and what else it says of them."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        """Raises ConvertError unless each token is another and has a kind."""
        self._metadata, self.where = metadata, where
        self.names = _texts(self("tokens"))
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConvertError(f"{where} has no {KEY}tokens in which each token is another; download it again")
        self.kinds = self.of_each("token_type", [_NORMAL] * len(self.names))
        self.ids = {name: index for index, name in enumerate(self.names)}

    def __call__(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(KEY + key, default)

    def of_each(self, key: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
        """A list with one entry for each token. Raises ConvertError for another."""
        found = self(key, default)
        if not isinstance(found, list) or len(found) != len(self.names):
            raise ConvertError(f"{self.where} has no {KEY}{key} for each of its {len(self.names)} tokens; download it again")
        return found

    def of_kind(self, kind: int) -> list[str]:
        """The tokens of it."""
        return [name for name, one in zip(self.names, self.kinds) if one == kind]

    def named(self, key: str) -> str | None:
        """The token whose id is kept as `key`; None where it is none."""
        token = self(f"{key}_token_id")
        return self.names[token] if isinstance(token, int) and 0 <= token < len(self.names) else None


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The tokenizer.json and the content of its tokenizer_config.json. Raises ConvertError for one that cannot be made."""
    vocabulary = _Vocabulary(metadata, where)
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if (kind := vocabulary("model")) not in makers:
        raise ConvertError(
            f"{where} has {KEY}model={kind!r}; {' or '.join(makers)} can be read: give the tokenizer with --tokenizer"
        )
    try:
        made = makers[kind](vocabulary)
        made.add_special_tokens([AddedToken(name, normalized=False) for name in vocabulary.of_kind(_CONTROL)])
        made.add_tokens([AddedToken(name, normalized=False) for name in vocabulary.of_kind(_USER_DEFINED)])
        bos = vocabulary.named("bos")
        if bos is not None and vocabulary("add_bos_token", kind == "llama"):
            made.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, vocabulary.ids[bos])]
            )
        text = made.to_str()
    except ConvertError:
        raise
    except Exception as error:  # the library's are bare
        what = " ".join(str(error).split())
        raise ConvertError(f"{where} holds no whole tokenizer ({what}); give it with --tokenizer") from None
    ends = {f"{name}_token": token for name, key in ENDS.items() if (token := vocabulary.named(key)) is not None}
    return text, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends}


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    cut = vocabulary("pre")
    if cut not in WORDS:
        raise ConvertError(
            f"{vocabulary.where} has {KEY}pre={cut!r}; {', '.join(WORDS)} can be read: give the model's tokenizer.json with --tokenizer"
        )
    merges = [merge.split(" ") for merge in _texts(vocabulary("merges"))]
    if any(len(parts) != 2 for parts in merges):
        raise ConvertError(f"{vocabulary.where} has {KEY}merges that are not of two tokens; download it again")
    pairs = [(left, right) for left, right in merges]
    made = byte_level(models.BPE(vocabulary.ids, pairs, ignore_merges=cut in _WHOLE_FIRST))
    made.pre_tokenizer = WORDS[cut]()
    if cut in _COMPOSED:
        made.normalizer = normalizers.NFC()
    return made


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = dict(zip(vocabulary.names, vocabulary.of_each("scores")))
    pairs = _merges({name: scores[name] for name in vocabulary.of_kind(_NORMAL)}, vocabulary.ids)
    unknown = vocabulary.named("unknown")
    made = tokenizers.Tokenizer(models.BPE(vocabulary.ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = bool(vocabulary("add_space_prefix", True))
    prefix = [normalizers.Prepend(_MARK)] if prefixed else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _merges(scores: Mapping[str, float], order: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of tokens that are one together, in the order in which SentencePiece merges them: by the score of what they make."""

    def found() -> Iterator[tuple[float, int, int, str, str]]:
        for name, score in scores.items():
            for cut in range(1, len(name)):
                left, right = name[:cut], name[cut:]
                if left in scores and right in scores:
                    yield -score, order[left], order[right], left, right

    return [(left, right) for *_, left, right in sorted(found())]


def _texts(value: Any) -> list[str]:
    """A list of texts; empty where it is none."""
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else []

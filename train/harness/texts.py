"""Texts of a benchmark as the tokens that a run reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from plait.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """How texts become tokens.

    Source: lm-evaluation-harness 0.4.13, `TemplateLM` and `get_rolling_token_windows`, whose cuts these are.
    """

    tokenizer: Tokenizer
    document_start: bool
    """Whether a text begins with the start token, where it does not spell it."""
    special: bool = False
    """Whether names of special tokens in a text stand for them, as they do in a chat."""

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that begins. Raises ValueError where it is not UTF-8."""
        plain = self._plain(text)
        begins = self.document_start and plain[:1] != [self.tokenizer.bos_id]
        return [self.tokenizer.bos_id] * begins + plain

    def prompt(self, text: str) -> list[int]:
        """The same with at least one token."""
        return self.ids(text) or [self.tokenizer.bos_id]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens that are given and tokens that follow; spaces at the end of the context are of what follows, and without a context the start
        token is given. Raises ValueError where nothing follows."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            given, follows = [self.tokenizer.bos_id], self._plain(continuation)
            given, follows = (given, follows) if follows[:1] != given else (follows[:1], follows[1:])
        else:
            given = self.ids(kept)
            follows = self.ids(kept + continuation)[len(given) :] or self._plain(continuation)
        if not follows:
            raise ValueError(f"continuation={continuation!r} has no token to be scored; give text")
        return given, follows

    def windows(self, text: str, longest: int) -> Iterator[tuple[list[int], list[int]]]:
        """Pairs in which each token of a text follows once, the first after the start token, with at most `longest` tokens read for each; the
        last pair is given as many as fit."""
        ids = self._plain(text)
        whole = [self.tokenizer.bos_id, *ids]
        for first in range(0, len(ids), longest):
            stop = min(first + longest, len(ids))
            start = max(0, stop - longest) if first else 0
            yield whole[start : first + 1], ids[first:stop]

    def _plain(self, text: str) -> list[int]:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"text={text[:60]!r} is not UTF-8; give text")
        encode = self.tokenizer.encode_special if self.special else self.tokenizer.encode
        return encode(text).tolist()


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where an answer ends."""

    tokens: frozenset[int]
    """The end-of-text token, and others that end it."""
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, until: Iterable[str], more: Iterable[int] = ()) -> Ends:
        """Ends at these texts; names of special tokens, which are no text of an answer, are their tokens."""
        texts = [text for text in until if text]
        ids = {text: tokenizer.encode_special(text).tolist() for text in texts}
        special = {text: one[0] for text, one in ids.items() if len(one) == 1 and not tokenizer.token_bytes(one[0])}
        return cls(frozenset({tokenizer.eos_id, *more, *special.values()}), tuple(text for text in texts if text not in special))

    def cut(self, tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, bool]:
        """The answer before its end, and whether there is one."""
        stop = next((place for place, token in enumerate(ids) if token in self.tokens), len(ids))
        text = tokenizer.decode(ids[:stop])
        first = min((place for end in self.texts if (place := text.find(end)) >= 0), default=len(text))
        return text[:first], stop < len(ids) or first < len(text)

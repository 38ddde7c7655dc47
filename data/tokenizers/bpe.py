"""Byte-level BPE vocabularies learned from text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import models, pre_tokenizers, trainers

from plait.data.config import BYTE_VOCAB, DataError
from plait.data.tokenizers.tokenizer import BYTE_CHARS, END_OF_TEXT, byte_level
from plait.data.tokenizers.tokenizer_json import JsonTokenizer, split_long

WORD_BYTES = 256
"""Longer words (text without spaces, as some scripts, base64 or DNA are) are learned from in parts: learning is quadratic in their length."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens learned from the texts (fewer where they hold too little)."""
    if vocab_size < BYTE_VOCAB:
        raise DataError(f"data.vocab_size={vocab_size} must be at least {BYTE_VOCAB}; use {BYTE_VOCAB} or more")
    tok = byte_level(models.BPE())
    words = tok.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(BYTE_CHARS), show_progress=False
    )
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=WORD_BYTES)])
    tok.train_from_iterator((piece for text in texts for piece in split_long(text)), trainer)
    tok.pre_tokenizer = words
    return JsonTokenizer(tok.to_str(), eos=END_OF_TEXT)

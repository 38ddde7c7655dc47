"""The tokenizer of a corpus that is to be prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plait.data import corpus
from plait.data.config import DataConfig
from plait.data.corpus import learnable
from plait.data.progress import advance
from plait.data.shards.pieces import cut
from plait.data.sources.source import Source
from plait.data.tokenizers.bpe import train_bpe
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer

LOOKS = 256
"""Places of a corpus from which a vocabulary is learned."""


def tokenizer_for(config: DataConfig, source: Source, shard_bytes: int) -> Tokenizer:
    """The tokenizer that the config asks for, learned from the text where it says `bpe`.

    Of more than 64 MiB the beginnings of up to 256 pieces, evenly spread, are learned from, so that no pass over everything is needed.

    Raises:
        DataError: the source cannot be read, or the tokenizer not used.
    """
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    return train_bpe(_sample(source, shard_bytes), config.bpe_vocab_size)


def _sample(source: Source, shard_bytes: int) -> Iterator[str]:
    small = source.num_bytes <= corpus.TRAIN_BYTES
    pieces = [source] if small else [piece.source for piece in cut(source, shard_bytes, "")]
    chosen = pieces if len(pieces) <= LOOKS else [pieces[i * len(pieces) // LOOKS] for i in range(LOOKS)]
    share = float("inf") if small else corpus.TRAIN_BYTES / len(chosen)
    for piece in chosen:
        left = share
        for document in dataclasses.replace(piece, may_be_empty=True).documents():
            text = learnable(document, source.name)
            advance(0, len(text))
            yield text
            left -= len(text)
            if left <= 0:
                break

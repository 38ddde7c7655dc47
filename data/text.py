"""Text as rows: the corpus tokenised, its documents held out or read in another order each epoch."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np

from plait.data.batch import Batch
from plait.data.cache import making, sweep
from plait.data.config import DataConfig, DataError
from plait.data.corpus import Corpus, CorpusMeta, find_corpus, load_corpus, split, train_tokenizer
from plait.data.loader import Data, Reading
from plait.data.packing import Documents, Packing, shuffled_order
from plait.data.shards.prepared import Prepared, PreparedMeta, check_asked, is_prepared, open_prepared
from plait.data.shards.rows import Arc, ShardRows
from plait.data.sources.source import Source, open_source
from plait.data.tokenizers.files import load_tokenizer, read_meta
from plait.data.tokenizers.tokenizer import META_FILE, ByteTokenizer, Tokenizer

log = logging.getLogger("plait.data")


class Rows:
    """The rows of some documents, in an order that differs from epoch to epoch.

    In each epoch documents are put in another order before they are cut into rows, and the rows in another order again.

    Args:
        documents: what to read.
        config: `seq_len`, `document_start`, `seed`.
        tokenizer: start and end tokens.
        name: salt of the order.
    """

    def __init__(self, documents: Documents, config: DataConfig, tokenizer: Tokenizer, name: str) -> None:
        self._documents = documents
        self._salt = (name, config.seed)
        self._start_id = tokenizer.bos_id if config.document_start else None
        self._end_id = tokenizer.eos_id
        self._seq_len = config.seq_len
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        pairs = documents.num_tokens + (len(documents) if config.document_start else 0)
        self.num_targets = pairs
        self.num_rows = -(-pairs // config.seq_len)

    def read(self, index: np.ndarray) -> Batch:
        """The rows with these ascending numbers, counted from the first row of the first epoch on, [R, T]."""
        parts = []
        for epoch in np.unique(index // self.num_rows):
            packing, order = self._epoch(int(epoch))
            parts.append(packing.rows(order[index[index // self.num_rows == epoch] % self.num_rows]))
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def _make_epoch(self, epoch: int) -> tuple[Packing, np.ndarray]:
        documents = self._documents.take(shuffled_order(self._documents.hashes, *self._salt, "documents", epoch))
        packing = Packing(documents, seq_len=self._seq_len, start_id=self._start_id, end_id=self._end_id)
        return packing, shuffled_order(np.arange(packing.num_rows), *self._salt, "rows", epoch)


@dataclasses.dataclass(frozen=True)
class Text:
    """What is read of a corpus."""

    train: Rows | ShardRows
    val: Rows | ShardRows
    fingerprint: str
    facts: dict[str, object]


def open_text(config: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
    """Tokenises the corpus where that has not been done, and gives its batches.

    On hosts that share a file system, let one call this first, and the others find the cache.

    Args:
        config: what to read.
        folder: the run folder; it keeps the tokenizer, in tokenizer/, and the tokens unless `config.cache_dir` says where.
        rows, reading: as in `plait.data.loader.build_data`.

    Raises:
        DataError: the corpus, tokenizer or cache is not usable, or too small for `seq_len`.
    """
    read = _read_prepared if is_prepared(config.source) else _read_source
    tokenizer, text = read(config, folder, reading)
    if reading is None and text.train.num_targets < config.seq_len:
        raise DataError(
            f"data.seq_len={config.seq_len} is more than the {text.train.num_targets} tokens there are to train on "
            f"({text.facts['num_documents']} documents, {text.facts['num_tokens']} tokens, {text.val.num_targets} held out); "
            f"use more text, or data.seq_len={max(text.train.num_targets, 1)} or less"
        )
    if reading is None and text.train.num_rows < config.batch_size:
        log.warning(
            "data.batch_size=%d is more than the %d rows of an epoch: a batch repeats rows",
            config.batch_size,
            text.train.num_rows,
        )
    return Data(
        config=config,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        read_train=text.train.read,
        read_val=text.val.read,
        num_val_rows=text.val.num_rows,
        num_train_rows=text.train.num_rows,
        rows=rows,
        identity={
            "corpus": text.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "val_fraction": config.val_fraction,
            "document_start": config.document_start,
            "seed": config.seed,
            **({} if config.split_seed is None else {"split_seed": config.split_seed}),
        },
        facts=text.facts,
    )


def _read_source(config: DataConfig, folder: Path, reading: Reading | None) -> tuple[Tokenizer, Text]:
    """Files of text, tokenised into the cache."""
    kept, cache = folder / "tokenizer", cache_of(config, folder)
    source = open_source(config.source, config.text_field, config.prompt_field)
    if reading is None:
        sweep(cache)
        tokenizer = prepare_tokenizer(config, source, kept, cache)
        corpus = load_corpus(source, tokenizer, cache)
        _check_trained_on(kept, config, corpus)
    else:
        tokenizer = reading.tokenizer or load_tokenizer(kept)
        corpus = find_corpus(source, tokenizer, cache) or load_corpus(source, tokenizer, reading.scratch)
    if reading is not None and reading.corpus not in (None, corpus.meta.fingerprint):
        train_documents, val_documents = corpus.documents.take(np.arange(0)), corpus.documents
    else:
        train_documents, val_documents = split(corpus.documents, config.val_fraction, config.seed_of_split)
    train, val = (
        Rows(documents, config, tokenizer, name) for documents, name in ((train_documents, "train"), (val_documents, "val"))
    )
    num_val_bytes = val_documents.num_bytes(tokenizer.bytes_per_token)
    facts: dict[str, object] = {
        **_facts(corpus.meta, train, val),
        "num_train_bytes": corpus.meta.num_token_bytes - num_val_bytes,
        "num_val_bytes": num_val_bytes,
        **({} if corpus.documents.given is None else {"num_prompt_tokens": int(corpus.documents.given.sum())}),
    }
    return tokenizer, Text(train, val, corpus.meta.fingerprint, facts)


def _read_prepared(config: DataConfig, folder: Path, reading: Reading | None) -> tuple[Tokenizer, Text]:
    """Shards, which are only read."""
    prepared, kept = open_prepared(config.source), folder / "tokenizer"
    if reading is None:
        tokenizer = keep_prepared_tokenizer(config, prepared, kept)
    else:
        tokenizer = reading.tokenizer or load_tokenizer(kept)
        if tokenizer.fingerprint != prepared.meta.tokenizer:
            raise DataError(
                f"data.source={config.source!r} has shards of another tokenizer than the run's; give the text they were made of"
            )
    everything = reading is not None and reading.corpus not in (None, prepared.meta.fingerprint)
    held = Arc.everything() if everything else Arc.held_out(config.val_fraction, config.seed_of_split)
    train, val = (ShardRows(prepared, arc, config, tokenizer, name) for arc, name in ((held.others, "train"), (held, "val")))
    if config.val_fraction and not val.num_rows:
        log.warning(
            "data.val_fraction=%g holds out none of the %d documents of %s: loss/val has nothing of it; raise data.val_fraction, or use "
            "another data.split_seed",
            config.val_fraction,
            prepared.meta.num_documents,
            config.source,
        )
    facts = {**_facts(prepared.meta, train, val), "num_shards": len(prepared.meta.shards)}
    return tokenizer, Text(train, val, prepared.meta.fingerprint, facts)


def _facts(meta: CorpusMeta | PreparedMeta, train: Rows | ShardRows, val: Rows | ShardRows) -> dict[str, object]:
    return {
        "source": meta.source,
        "num_documents": meta.num_documents,
        "num_tokens": meta.num_tokens,
        "num_bytes": meta.num_bytes,
        "bytes_per_token": round(meta.num_bytes / meta.num_tokens, 4),
        "num_train_rows": train.num_rows,
        "num_train_tokens": train.num_targets,
        "num_val_tokens": val.num_targets,
    }


def cache_of(config: DataConfig, folder: Path) -> Path:
    """Where tokens are kept that a run makes itself."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else folder / "data"


def keep_prepared_tokenizer(config: DataConfig, prepared: Prepared, folder: Path) -> Tokenizer:
    """The tokenizer of shards, which `folder` keeps from now on.

    Raises:
        DataError: it is not the one that the config asks for, or `folder` keeps another one.
    """
    meta = read_meta(folder)
    if meta is None:
        check_asked(prepared, config)
        tokenizer = prepared.tokenizer()
        tokenizer.save(folder, tokenizer=config.tokenizer, vocab_size=config.size_to_learn)
        return tokenizer
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != prepared.meta.tokenizer:
        raise DataError(f"{folder} keeps another tokenizer than that of the shards in {prepared.folder}; use another run folder")
    return tokenizer


def prepare_tokenizer(config: DataConfig, source: Source, folder: Path, cache: Path, *, of_many: bool = False) -> Tokenizer:
    """The run's tokenizer: the one kept in `folder`, or a new one, which is then kept there.

    Args:
        of_many: whether `source` is several, none of which it is learned from alone.

    Raises:
        DataError: the one kept there is not the one the config asks for, or none can be made.
    """
    size = config.size_to_learn
    meta = read_meta(folder)
    if meta is not None:
        if (meta.tokenizer, meta.vocab_size) != (config.tokenizer, size):
            raise DataError(
                f"{folder} keeps the tokenizer of another run (data.tokenizer={meta.tokenizer!r}, data.vocab_size={meta.vocab_size}, "
                f"and now {config.tokenizer!r}, {size}); use another run folder"
            )
        return load_tokenizer(folder)
    fingerprint = None
    if config.tokenizer == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        shared = cache / f"bpe-{config.bpe_vocab_size}-{source.signature()[:16]}"
        tokenizer, fingerprint = _learned(shared) or _learn(config, source, shared)
        if tokenizer.vocab_size < config.bpe_vocab_size:
            log.warning("the corpus gives %d tokens of data.vocab_size=%d", tokenizer.vocab_size, config.bpe_vocab_size)
    tokenizer.save(folder, corpus=None if of_many else fingerprint, tokenizer=config.tokenizer, vocab_size=size)
    return tokenizer


def _learned(folder: Path) -> tuple[Tokenizer, str] | None:
    """The tokenizer in a folder of the cache and the fingerprint of its text, where it is whole; else the folder is emptied."""
    if not folder.exists():
        return None
    try:
        meta, tokenizer = read_meta(folder), load_tokenizer(folder)
        if meta is not None and meta.corpus is not None:
            return tokenizer, meta.corpus
        problem: object = f"it has no whole {META_FILE}"
    except DataError as error:
        problem = error
    log.warning("%s is not whole (%s); learning the vocabulary again", folder, problem)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _learn(config: DataConfig, source: Source, folder: Path) -> tuple[Tokenizer, str]:
    with making(folder) as partial:
        tokenizer, fingerprint = train_tokenizer(source, config.bpe_vocab_size)
        tokenizer.save(partial, corpus=fingerprint)
    return tokenizer, fingerprint


def _check_trained_on(folder: Path, config: DataConfig, corpus: Corpus) -> None:
    meta = read_meta(folder)
    if meta is not None and meta.corpus not in (None, corpus.meta.fingerprint):
        raise DataError(
            f"{folder} keeps a tokenizer trained on other text than data.source={config.source!r} holds now; use another run "
            f"folder, or keep that tokenizer with data.tokenizer={folder}"
        )

"""Batches by step number: any step of any epoch, the same rows whatever the number of hosts, resumed exactly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import grain
import numpy as np

from plait.data.batch import Batch
from plait.data.config import DataConfig, DataError
from plait.data.corpus import Corpus, load_corpus, split, train_tokenizer
from plait.data.packing import Documents, Packing, shuffled_order
from plait.data.sources import Source, open_source
from plait.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_meta

log = logging.getLogger("plait.data")

PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches made ahead of the step, in one thread


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


class ValBatches(Sequence[Batch]):
    """The held-out rows in one fixed random order, every row once; the last batch is filled up with rows of padding.

    So the first few batches are a fair sample of the whole. Of each batch of `batch_size` rows only those numbered `held` are read.
    """

    def __init__(self, rows: Rows | None, batch_size: int, held: np.ndarray) -> None:
        self._rows, self._batch_size, self._held = rows, batch_size, held

    def __len__(self) -> int:
        return 0 if self._rows is None else -(-self._rows.num_rows // self._batch_size)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if self._rows is None or not -len(self) <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        wanted = index % len(self) * self._batch_size + self._held
        real = wanted[wanted < self._rows.num_rows]
        batch = self._rows.read(real if len(real) else np.zeros(1, np.int64))
        padding = ((0, len(wanted) - len(real)), (0, 0))
        return Batch(*(np.pad(array[: len(real)], padding) for array in batch))


class DataIterator(Iterator[Batch]):
    """Training batches without end, made ahead in a background thread; its state is that of the last batch returned.

    Args:
        steps: batch of each step number.
        identity: what the order of rows depends on; a state with another identity is refused.
    """

    def __init__(self, steps: grain.MapDataset, identity: dict[str, object]) -> None:
        self._batches = iter(steps.to_iter_dataset(PREFETCH))
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def step(self) -> int:
        """The number of batches returned since the start of training."""
        return grain.experimental.get_next_index(self._batches)

    def get_state(self) -> dict[str, object]:
        """What `set_state` needs to go on after the last batch returned, on any number of hosts; small, and JSON."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, object]) -> None:
        """Goes on where `state` was taken.

        Raises:
            DataError: it was taken with other data, or another order of it.
        """
        changed = [
            f"{key} was {state.get(key)!r} and is {mine!r}" for key, mine in self._identity.items() if state.get(key) != mine
        ]
        if changed:
            raise DataError(
                f"the data position in this checkpoint belongs to other data: {'; '.join(changed)}; "
                "resume with the data it was trained on, or start a new run from its weights"
            )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise DataError(
                f"the data position in this checkpoint has step={step!r}, not a number of batches; use another checkpoint"
            )
        grain.experimental.set_next_index(self._batches, step)

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


@dataclass(frozen=True, kw_only=True)
class Data:
    """A tokenizer, training batches and validation batches.

    Attributes:
        tokenizer: of the corpus; `tokenizer.bytes_per_token[targets]` gives bits per byte.
        val: the same batches every time; empty where nothing is held out.
        corpus: what was tokenised.
        num_train_rows: rows in an epoch.
        num_train_tokens, num_val_tokens: predicted tokens, each document's end counted.
        num_train_bytes, num_val_bytes: bytes of text in the documents of either side.
        steps: training batch n.
        identity: what the order of rows depends on.
        whole: gives all rows of the first held-out batch, or of the first training batch where nothing is held out.
    """

    tokenizer: Tokenizer
    config: DataConfig
    corpus: Corpus
    val: ValBatches
    num_train_rows: int
    num_train_tokens: int
    num_val_tokens: int
    num_train_bytes: int
    num_val_bytes: int
    steps: grain.MapDataset
    identity: dict[str, object]
    whole: Callable[[], Batch]

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs."""
        return self.tokenizer.vocab_size

    def train(self) -> DataIterator:
        """A new iterator at step 0."""
        return DataIterator(self.steps, self.identity)

    def epoch(self, step: int) -> float:
        """Epochs read after this many steps."""
        return step * self.config.batch_size / self.num_train_rows

    def summary(self) -> dict[str, object]:
        """What a run should write down about its data; JSON."""
        meta = self.corpus.meta
        return {
            **self.identity,
            "source": meta.source,
            "vocab_size": self.vocab_size,
            "num_documents": meta.num_documents,
            "num_tokens": meta.num_tokens,
            "num_bytes": meta.num_bytes,
            "bytes_per_token": round(meta.num_bytes / meta.num_tokens, 4),
            "num_train_rows": self.num_train_rows,
            "num_train_tokens": self.num_train_tokens,
            "num_val_tokens": self.num_val_tokens,
            "num_train_bytes": self.num_train_bytes,
            "num_val_bytes": self.num_val_bytes,
        }


def build_data(
    config: DataConfig,
    folder: str | Path,
    *,
    rows: np.ndarray | None = None,
    tokenizer_folder: str | Path | None = None,
) -> Data:
    """Tokenises the corpus where that has not been done, and gives its batches.

    Batch n is the same for any `rows`, which says which rows of it are read here. On hosts that share a file system, let one call
    this first, and the others find the cache.

    Args:
        config: what to read.
        folder: the run folder; it keeps the tokenizer, and the tokens unless `config.cache_dir` says where.
        rows: ascending numbers in `range(batch_size)`; None for all.
        tokenizer_folder: where the run's tokenizer is kept; None is `folder`/tokenizer. What is there is used again.

    Raises:
        DataError: the corpus, tokenizer or cache is not usable, or too small for `seq_len`.
    """
    folder = Path(folder)
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else folder / "data"
    source = open_source(config.source, config.text_field)
    tokenizer = prepare_tokenizer(config, source, Path(tokenizer_folder or folder / "tokenizer"), cache)
    corpus = load_corpus(source, tokenizer, cache)
    _check_trained_on(tokenizer_folder or folder / "tokenizer", config, corpus)
    train_documents, val_documents = split(corpus.documents, config.val_fraction, config.seed)
    train = Rows(train_documents, config, tokenizer, "train")
    val = Rows(val_documents, config, tokenizer, "val") if len(val_documents) else None
    if train.num_targets < config.seq_len:
        raise DataError(
            f"data.seq_len={config.seq_len} is more than the {train.num_targets} tokens there are to train on "
            f"({corpus.meta.num_documents} documents, {corpus.meta.num_tokens} tokens, {val_documents.num_tokens} held out); "
            f"use more text, or data.seq_len={max(train.num_targets, 1)} or less"
        )
    if train.num_rows < config.batch_size:
        log.warning(
            "data.batch_size=%d is more than the %d rows of an epoch: a batch repeats rows", config.batch_size, train.num_rows
        )
    every = np.arange(config.batch_size)
    held = every if rows is None else np.asarray(rows, np.int64)
    num_val_bytes = val_documents.num_bytes(tokenizer.bytes_per_token)
    return Data(
        tokenizer=tokenizer,
        config=config,
        corpus=corpus,
        val=ValBatches(val, config.batch_size, held),
        num_train_rows=train.num_rows,
        num_train_tokens=train.num_targets,
        num_val_tokens=val.num_targets if val else 0,
        num_train_bytes=corpus.meta.num_token_bytes - num_val_bytes,
        num_val_bytes=num_val_bytes,
        steps=grain.MapDataset.range(sys.maxsize).map(lambda step: train.read(step * config.batch_size + held)),
        whole=lambda: next(iter(ValBatches(val, config.batch_size, every) or [train.read(every)])),
        identity={
            "corpus": corpus.meta.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "val_fraction": config.val_fraction,
            "document_start": config.document_start,
            "seed": config.seed,
        },
    )


def prepare_tokenizer(config: DataConfig, source: Source, folder: Path, cache: Path) -> Tokenizer:
    """The run's tokenizer: the one kept in `folder`, or a new one, which is then kept there.

    Raises:
        DataError: the one kept there is not the one the config asks for.
    """
    wanted = {"tokenizer": config.tokenizer, "vocab_size": config.bpe_vocab_size if config.tokenizer == "bpe" else None}
    meta = read_meta(folder)
    if meta:
        if (kept := {key: meta.get(key) for key in wanted}) != wanted:
            raise DataError(f"{folder} keeps the tokenizer of another run ({kept}, and now {wanted}); use another run folder")
        return load_tokenizer(folder)
    fingerprint = None
    if config.tokenizer == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        shared = cache / f"bpe-{config.bpe_vocab_size}-{source.signature()[:16]}"
        if read_meta(shared):
            tokenizer, fingerprint = load_tokenizer(shared), read_meta(shared)["corpus"]
        else:
            tokenizer, fingerprint = train_tokenizer(source, config.bpe_vocab_size)
            tokenizer.save(shared, corpus=fingerprint)
        if tokenizer.vocab_size < config.bpe_vocab_size:
            log.warning("the corpus gives %d tokens of data.vocab_size=%d", tokenizer.vocab_size, config.bpe_vocab_size)
    tokenizer.save(folder, corpus=fingerprint, **wanted)
    return tokenizer


def _check_trained_on(folder: str | Path, config: DataConfig, corpus: Corpus) -> None:
    kept = read_meta(Path(folder)).get("corpus")
    if kept is not None and kept != corpus.meta.fingerprint:
        raise DataError(
            f"{folder} keeps a tokenizer trained on other text than data.source={config.source!r} holds now; use another run "
            f"folder, or keep that tokenizer with data.tokenizer={folder}"
        )

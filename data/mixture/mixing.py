"""Several sources as one stream of rows, each row of one source."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from plait.data.batch import Batch
from plait.data.config import DataConfig, DataError
from plait.data.loader import Data, Reading, ReadRows
from plait.data.mixture.schedule import Schedule, Share
from plait.data.shards.prepared import Prepared, check_asked, is_prepared, open_prepared
from plait.data.sources.readers import Document
from plait.data.sources.source import Source, open_source
from plait.data.text import cache_of, keep_prepared_tokenizer, prepare_tokenizer


def open_mixture(config: DataConfig, folder: Path, rows: np.ndarray | None, reading: Reading | None) -> Data:
    """The batches of `config.sources`, whose rows are mixed as the weights say. All text has one tokenizer.

    Args:
        config, folder, rows, reading: as in `plait.data.loader.build_data`.

    Raises:
        DataError: a source is not usable, or they do not go together.
    """
    if reading is None:
        _settle_tokenizer(config, folder)
    else:
        reading = dataclasses.replace(reading, corpus=None)  # whether it is the run's is told by all sources together
    opened = {name: one.task.open(one, folder, None, reading) for name, one in config.parts.items()}
    tokenizer = next((data.tokenizer for data in opened.values() if data.tokenizer is not None), None)
    vocab_size = max([data.vocab_size for data in opened.values() if data.tokenizer is not None], default=0)
    firsts, vocab_size = config.with_ids(vocab_size)
    parts: dict[str, Data] = {}
    for name, data in opened.items():
        train, val = (_shifted(read, firsts[name]) for read in (data.read_train, data.read_val))
        parts[name] = dataclasses.replace(data, rows=rows, read_train=train, read_val=val)
    schedule = Schedule(_shares(config, parts), config.seed)
    of_rows = ("seq_len", "batch_size")  # which readers may choose
    identities = {
        name: {key: value for key, value in data.identity.items() if key not in of_rows} for name, data in parts.items()
    }
    order = {name: [one.weight, one.curriculum, one.max_epochs] for name, one in config.sources.items()}
    text = json.dumps([identities, sorted(identities)], sort_keys=True)
    return Data(
        config=config,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        read_train=functools.partial(_read_train, list(parts.values()), schedule),
        read_val=functools.partial(_read_val, list(parts.values())),
        num_val_rows=sum(data.num_val_rows for data in parts.values()),
        rows=rows,
        parts=parts,
        schedule=schedule,
        identity={
            "corpus": hashlib.sha256(text.encode()).hexdigest(),
            **({} if tokenizer is None else {"tokenizer": tokenizer.fingerprint}),
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "sources": order,
            "temperature": config.temperature,
        },
        facts={"sources": {name: dict(data.facts) for name, data in parts.items()}},
    )


def _shares(config: DataConfig, parts: Mapping[str, Data]) -> list[Share]:
    """What each source asks for. Raises DataError for a source without a size that needs one."""
    shares = []
    for name, one in config.sources.items():
        num_rows = parts[name].num_train_rows
        if num_rows is None and (one.weight is None or one.max_epochs is not None):
            field = "weight=None" if one.weight is None else f"max_epochs={one.max_epochs}"
            raise DataError(
                f"data.sources.{name}.{field} asks for the number of its rows, and those of data.task={parts[name].config.task.name} are "
                "made without end; " + ("give it a weight" if one.weight is None else "leave it out")
            )
        weights = [(0, float(num_rows or 0) if one.weight is None else one.weight)]
        weights += [(step * config.batch_size, weight) for step, weight in one.later]
        limit = None if one.max_epochs is None or num_rows is None else max(1, round(one.max_epochs * num_rows))
        shares.append(Share(tuple((row, weight ** (1 / config.temperature)) for row, weight in weights), limit))
    return shares


def _shifted(read: ReadRows, by: int) -> ReadRows:
    """Rows whose ids begin at another number."""
    if not by:
        return read

    def shifted(index: np.ndarray) -> Batch:
        batch = read(index)
        real = batch.segment_ids > 0
        return batch._replace(
            tokens=np.where(real, batch.tokens + by, 0).astype(np.int32),
            targets=np.where(real, batch.targets + by, 0).astype(np.int32),
        )

    return shifted


def _read_train(parts: list[Data], schedule: Schedule, index: np.ndarray) -> Batch:
    source, number = schedule.locate(np.asarray(index, np.int64))
    return _gathered([part.read_train for part in parts], source, number)


def _read_val(parts: list[Data], index: np.ndarray) -> Batch:
    """Held-out rows of all sources, each evenly among the others."""
    sizes = [part.num_val_rows for part in parts]
    source = np.repeat(np.arange(len(parts)), sizes)
    number = np.concatenate([np.arange(size) for size in sizes])
    order = np.argsort((number + 0.5) / np.repeat(np.maximum(sizes, 1), sizes), kind="stable")[index]
    return _gathered([part.read_val for part in parts], source[order], number[order])


def _gathered(reads: list[ReadRows], source: np.ndarray, number: np.ndarray) -> Batch:
    """The rows of these numbers of these sources."""
    order = np.lexsort((number, source))
    parts = [reads[one](number[source == one]) for one in np.unique(source).tolist()]
    back = np.argsort(order, kind="stable")
    return Batch(*(np.concatenate(arrays)[back] for arrays in zip(*parts)))


def _settle_tokenizer(config: DataConfig, folder: Path) -> None:
    """Lets the run folder keep the one tokenizer of all text: that of the shards where some sources are prepared."""
    kept = folder / "tokenizer"
    texts = {name: one for name, one in config.parts.items() if one.task.reads_text}
    prepared = {
        name: open_prepared(one.source, f"data.sources.{name}.source") for name, one in texts.items() if is_prepared(one.source)
    }
    _check_one_tokenizer(prepared)
    for name, one in prepared.items():
        check_asked(one, texts[name], f"data.sources.{name}.source")
        keep_prepared_tokenizer(texts[name], one, kept)
    if texts and not prepared:
        sources = [open_source(one.source, one.text_field, one.prompt_field) for one in texts.values()]
        prepare_tokenizer(config, _Together(tuple(sources)), kept, cache_of(config, folder), of_many=True)


def _check_one_tokenizer(prepared: Mapping[str, Prepared]) -> None:
    for (name, one), (other_name, other) in itertools.pairwise(prepared.items()):
        if one.meta.tokenizer != other.meta.tokenizer:
            raise DataError(
                f"data.sources.{name} and data.sources.{other_name} have shards of different tokenizers; prepare them with one, as with "
                f"data.tokenizer={one.folder}"
            )


class _Together(Source):
    """Sources of which one vocabulary is learned."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        first = sources[0]
        super().__init__(
            ", ".join(one.name for one in sources), first.root, sum((one.files for one in sources), ()), first.fields
        )
        object.__setattr__(self, "sources", sources)
        self.sources: tuple[Source, ...]

    def signature(self) -> str:
        return hashlib.sha256("".join(one.signature() for one in self.sources).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(one.documents() for one in self.sources)

"""What a run held out, or other text, as rows for its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from plait.configs.components import Config, at, unchecked, validate
from plait.configs.domains import Line
from plait.data.config import DataConfig
from plait.data.loader import Data, Reading, build_data, differences
from plait.data.tasks.base import Task
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.models.axes import BATCH
from plait.train.mesh import ways
from plait.train.pods.hosts.layout import batch_layout
from plait.train.program import Program
from plait.train.run import RunError, Trained


@dataclasses.dataclass(frozen=True)
class OtherText(Config):
    """Text to score in place of what the run held out."""

    source: Line | None = None
    """A file or folder as for training; where it is not the text of the run, all of it is scored."""
    text_field: Line | None = None
    """The field or column that holds a document's text; that of the run by default."""
    prompt_field: Line | None = None
    """That of what stands before the text and is not scored; that of the run by default."""


def held_out(trained: Trained, task: Task, text: OtherText, scratch: Path, seq_len: int | None = None) -> Data:
    """The rows of a task for the run's model: as long and as many in a batch as the run's, or of `seq_len` tokens.

    Longer rows are fewer in a batch, so that it has about as many tokens.

    Raises:
        ValueError: the run's model cannot read them, or what it was trained on is no longer there and no other text was asked for.
    """
    program, own = trained.program, trained.program.config.data
    if seq_len is not None:
        _require_length(trained, seq_len)
    with unchecked():
        mixed = task.name == own.task.name and text.source is None
        config = dataclasses.replace(own, task=task)
        if not mixed:
            config = dataclasses.replace(config, sources={}, temperature=1.0)
        if seq_len is not None:
            config = dataclasses.replace(config, seq_len=seq_len, batch_size=_rows(program, seq_len))
    at(task.name, task.fit, config)
    task.require_causal(program.config.model.causal)
    _require_ids(trained, task)
    config = validate(config, "data")
    if task.reads_text:
        if trained.tokenizer is None:
            raise ValueError(
                f"--tasks {task.name} needs a run with a tokenizer, and this one was trained on data.task={own.task.name}; "
                f"use --tasks {own.task.name}"
            )
        config = dataclasses.replace(
            config,
            source=text.source or own.source,
            text_field=text.text_field or own.text_field,
            prompt_field=text.prompt_field or own.prompt_field,
        )
    known = trained.data.get("corpus") if config.source in _sources(own) else trained.data.get("corpus", "")
    reading = Reading(tokenizer=trained.tokenizer, corpus=known, scratch=scratch)
    rows = batch_layout(program.config, program.mesh, config).rows
    data = build_data(config, program.config.folder, rows=rows, reading=reading)
    size = program.config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise ValueError(
            f"--tasks {task.name} has {data.vocab_size} ids and the model {size}; use options of the task with which it has no more, "
            "or another run"
        )
    if text == OtherText() and not is_own(trained, data):
        same = {name: value for name, value in data.identity.items() if seq_len is None or name not in ("seq_len", "batch_size")}
        raise RunError(
            f"{program.config.folder!r} was trained on other text than data.source={own.source!r} holds now: "
            f"{differences(same, trained.data)}; bring that text back, or score all that is there now with "
            f"--data.source {own.source}"
        )
    return data


def _require_length(trained: Trained, seq_len: int) -> None:
    """Raises ValueError where the model cannot read rows of so many tokens."""
    for name, longest in trained.program.config.model.longest.items():
        if seq_len > longest:
            raise ValueError(
                f"--seq-len {seq_len} must be at most the {longest} tokens of the run's model.{name}, which knows no place beyond; "
                f"use {longest} or less, or a run without that limit"
            )


def _rows(program: Program, seq_len: int) -> int:
    """Rows of a batch of this length: no more than the run's, nor more tokens than the run's where the mesh allows."""
    own = program.config.data
    each = ways(program.mesh, BATCH) * program.config.optimizer.accumulate
    return each * max(1, min(own.batch_size, own.batch_size * own.seq_len // seq_len) // each)


def _require_ids(trained: Trained, task: Task) -> None:
    """Raises ValueError where the ids of the task stand for something else in what the run was trained on."""
    own = trained.program.config.data
    if task.name == own.task.name:
        mine, asked = own.task.vocabulary(own), task.vocabulary(own)
        if mine != asked:
            raise ValueError(
                f"--tasks {task.name} has {asked} ids with these options and had {mine} in the run's training, so that ids stand for other "
                "things; use the run's own vocabulary, or another run"
            )
    elif task.reads_bytes and not isinstance(trained.tokenizer, ByteTokenizer):
        ids = f"data.task={own.task.name}" if trained.tokenizer is None else f"data.tokenizer={own.tokenizer}"
        raise ValueError(
            f"--tasks {task.name} asks in bytes, and the ids of this run are those of {ids}; use a run with data.tokenizer=byte or "
            f"data.task={task.name}"
        )


def is_own(trained: Trained, data: Data) -> bool:
    """Whether rows are of what the run was trained on, or made on the fly. A model that was imported brings no fingerprint of its text,
    nor has a mixture one: they go by the name of the source."""
    corpus = data.identity.get("corpus")
    if corpus is None or "corpus" in trained.data:
        return corpus in (None, trained.data.get("corpus"))
    return data.config.source in _sources(trained.program.config.data)


def _sources(own: DataConfig) -> set[str]:
    """The names of the texts of a run."""
    return {part.source for part in own.parts.values()} or {own.source}

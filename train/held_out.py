"""What a run held out, or other text, as rows for its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from plait.configs.components import Config, at
from plait.configs.domains import Line
from plait.data.loader import Data, Reading, build_data, differences
from plait.data.tasks.base import Task
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


def held_out(trained: Trained, task: Task, text: OtherText, scratch: Path) -> Data:
    """The rows of a task, as long and as many in a batch as the run's. Raises ValueError where the run's model cannot read them, or
    where what the run was trained on is no longer there and no other text was asked for."""
    program, own = trained.program, trained.program.config.data
    at(task.name, task.fit, own)
    task.require_causal(program.config.model.causal)
    config = dataclasses.replace(own, task=task)
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
    reading = Reading(tokenizer=trained.tokenizer, corpus=trained.data.get("corpus"), scratch=scratch)
    data = build_data(config, program.config.folder, rows=program.layout.rows, reading=reading)
    size = program.config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise ValueError(
            f"--tasks {task.name} has {data.vocab_size} ids and the model {size}; use options of the task with which it has no more, "
            "or another run"
        )
    if text == OtherText() and not is_own(trained, data):
        raise RunError(
            f"{program.config.folder!r} was trained on other text than data.source={own.source!r} holds now: "
            f"{differences(data.identity, trained.data)}; bring that text back, or score all that is there now with "
            f"--data.source {own.source}"
        )
    return data


def is_own(trained: Trained, data: Data) -> bool:
    """Whether rows are of what the run was trained on, or made on the fly."""
    return data.identity.get("corpus") in (None, trained.data.get("corpus", data.identity.get("corpus")))

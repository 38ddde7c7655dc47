"""`launch.py eval RUN`."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from plait.configs import codec
from plait.configs.command_line.options import split_options
from plait.configs.command_line.words import parse as words_of
from plait.configs.domains import LENGTH, Counted, Line, Steps
from plait.data.config import DataConfig
from plait.data.loader import Data
from plait.data.tasks.base import TASKS, Task
from plait.train.by_source import Validation
from plait.train.commands import lm_eval
from plait.train.remote.reading import run_here
from plait.train.run import Trained, opened
from plait.train.scoring.evaluate import Evaluation
from plait.train.scoring.held_out import OtherText, held_out, is_own
from plait.train.terminal.results import check_new, keep
from plait.train.watching.scoreboard import show


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Scores a run on held-out rows. `--TASK.OPTION` sets an option of a task, as `--mqar.num-kv-pairs 16`. With `--lm-eval TASK` in place of
    `--tasks` it is scored by lm-evaluation-harness, which has other options: `eval --lm-eval TASK --help`."""

    ADDRESSES: ClassVar = ("run",)

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    tasks: Line | None = None
    """Comma-separated; `list tasks` shows them. By default what the run was trained on: its text, as ppl, or its task."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""
    seq_len: Line | None = None
    """Comma-separated lengths of rows in tokens, beyond that of training too, as 512,1024,2048; by default that of training."""
    batches: Steps | None = None
    """Batches of held-out rows; all by default."""
    data: OtherText = OtherText()
    """Other text than the run's."""
    out: Path | None = None
    """New file of the results; eval_STEP.json in the run folder by default, eval_STEP_NAME.json for other text, and eval_STEP_lengths.json
    for several lengths. One that holds results of other options stays, and eval_STEP_2.json and so on follow it."""


def parse(args: Sequence[str]) -> tuple[EvalArgs, dict[str, list[str]]]:
    """The options, and the words that are options of each task. Raises ValueError for a task that does not exist or is not asked for."""
    rest, words = list(args), dict[str, list[str]]()
    for name, task in TASKS.all().items():
        words[name], rest = split_options(task, rest, prefix=f"{name.replace('_', '-')}.")
    options = words_of(EvalArgs, rest, prog="launch.py eval")
    check_new("out", options.out)
    names = () if options.tasks is None else task_names(options.tasks)
    for name, given in words.items():
        if given and name not in names:
            raise ValueError(f"{given[0]} is an option of {name}, which is not asked for; name it in --tasks")
    return options, words


def task_names(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list of tasks. Raises ValueError for one that does not exist."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(f"--tasks {text!r} must name tasks among {', '.join(TASKS.all())}")
    for name in names:
        try:
            TASKS[name]
        except ValueError as error:
            raise ValueError(f"--tasks {text!r}: {error}") from None
    return names


def lengths(text: str) -> tuple[int, ...]:
    """The lengths of a comma-separated list, ascending. Raises ValueError for what is no length."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"--seq-len {text!r} must name lengths of rows; use 512,1024")
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) in LENGTH):
            raise ValueError(f"--seq-len {text!r} has {word!r}, and a length must be {LENGTH.rule}; use 512,1024")
    return tuple(sorted({int(word) for word in words}))


def run(args: Sequence[str]) -> None:
    """Scores a run on tasks, shows the results and writes them to a file. The run folder gets nothing else."""
    if lm_eval.is_asked(args):
        return lm_eval.run(args)
    options, words = parse(args)
    sizes = (None,) if options.seq_len is None else lengths(options.seq_len)
    options = dataclasses.replace(options, run=run_here(options.run, step=options.step))
    trained = opened(options.run, options.step)
    own = trained.program.config.data
    names = (own.task.name,) if options.tasks is None else task_names(options.tasks)
    tasks = [_task(own, name, words) for name in names]
    if options.data != OtherText() and not any(task.reads_text for task in tasks):
        raise ValueError(f"--data.source is text, and {', '.join(names)} reads none; add ppl to --tasks")
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        results: dict[str, object] = {"step": trained.step}
        file = f"eval_{trained.step}"
        every = [[held_out(trained, task, options.data, Path(scratch), size) for size in sizes] for task in tasks]
        for datas in every:
            data = datas[0]
            found = {one.config.seq_len: _score(trained, one, options.batches) for one in datas}
            other = "" if is_own(trained, data) else f" on {data.config.source}"
            show(found, f"{options.run} at step {trained.step}{other}", by_length=options.seq_len is not None)
            rows = [{"seq_len": size, **one.to_json()} for size, one in found.items()]
            results[data.config.task.name] = rows if options.seq_len is not None else found[data.config.seq_len].to_json()
            if other:
                results |= {"source": data.config.source, "corpus": data.identity["corpus"]}
                file = f"eval_{trained.step}_{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(data.config.source).name)}"
    asked = {
        "tasks": {task.name: codec.encode(task) for task in tasks},
        "seq_len": None if options.seq_len is None else sizes,
        "batches": options.batches,
        "data": codec.encode(options.data),
    }
    keep(results, asked, options.out, options.run / (f"{file}.json" if options.seq_len is None else f"{file}_lengths.json"))


def _score(trained: Trained, data: Data, batches: int | None) -> Evaluation:
    validation = Validation(trained.program.blueprint, trained.program.mesh, data)
    return validation(trained.params, trained.buffers, batches)


def _task(own: DataConfig, name: str, words: Mapping[str, list[str]]) -> Task:
    """The task with its options: those of the command line, else of the run where it was trained on it."""
    default = own.task if own.task.name == name else TASKS[name]()
    if not words[name]:
        return default
    return words_of(type(default), words[name], default=default, prefix=f"{name}.", prog="launch.py eval RUN")

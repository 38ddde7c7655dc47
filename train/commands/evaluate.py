"""`launch.py eval RUN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from plait.configs.components import at
from plait.configs.domains import Counted, Line, Steps
from plait.configs.options import split_options
from plait.configs.words import parse as words_of
from plait.data.loader import Data, build_data
from plait.data.tasks.base import TASKS, Task
from plait.train.commands.console import console
from plait.train.evaluate import Evaluation, Evaluator
from plait.train.run import Trained, opened, write_json

COLUMNS = {"loss": ("loss (nats/token)", ".4f"), "perplexity": ("perplexity", ".2f"), "bits_per_byte": ("bits per byte", ".4f")}
"""How a result is shown, where not by its name."""


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Scores a run on held-out rows. `--TASK.OPTION` sets an option of a task, as `--mqar.num-kv-pairs 16`."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    tasks: Line | None = None
    """Comma-separated; `list tasks` shows them. By default what the run was trained on: its text, as ppl, or its task."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""
    batches: Steps | None = None
    """Batches of held-out rows; all by default."""


def parse(args: Sequence[str]) -> tuple[EvalArgs, dict[str, list[str]]]:
    """The options, and the words that are options of each task. Raises ValueError for a task that does not exist or is not asked for."""
    rest, words = list(args), dict[str, list[str]]()
    for name, task in TASKS.all().items():
        words[name], rest = split_options(task, rest, prefix=f"{name.replace('_', '-')}.")
    options = words_of(EvalArgs, rest, prog="launch.py eval")
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


def run(args: Sequence[str]) -> None:
    """Scores a run on tasks, shows the results and writes them to eval_STEP.json in the run folder."""
    options, words = parse(args)
    with opened(options.run, options.step) as trained:
        names = (trained.setup.data.config.task.name,) if options.tasks is None else task_names(options.tasks)
        data = {name: _data(trained, _task(trained, name, words)) for name in names}
        results = {}
        for name, one in data.items():
            evaluator = Evaluator(trained.setup.blueprint, trained.setup.mesh, one)
            found = evaluator(trained.params, trained.buffers, one.val, options.batches)
            _show(found, f"{options.run} at step {trained.step}")
            results[name] = found.to_json()
        write_json(options.run / f"eval_{trained.step}.json", {"step": trained.step, **results})


def _task(trained: Trained, name: str, words: Mapping[str, list[str]]) -> Task:
    """The task with its options: those of the command line, else of the run where it was trained on it."""
    own = trained.setup.data.config.task
    default = own if own.name == name else TASKS[name]()
    if not words[name]:
        return default
    return words_of(type(default), words[name], default=default, prefix=f"{name}.", prog="launch.py eval RUN")


def _data(trained: Trained, task: Task) -> Data:
    """The rows of a task, as long and as many in a batch as the run's. Raises ValueError where the run's model cannot read them."""
    setup = trained.setup
    own = setup.data
    if task == own.config.task:
        return own
    if task.reads_text and own.tokenizer is None:
        trained_on = own.config.task.name
        raise ValueError(
            f"--tasks {task.name} needs a run with a tokenizer, and this one was trained on data.task={trained_on}; use --tasks {trained_on}"
        )
    at(task.name, task.fit, own.config)
    data = build_data(dataclasses.replace(own.config, task=task), setup.config.folder, rows=setup.layout.rows)
    size = setup.config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise ValueError(
            f"--tasks {task.name} has {data.vocab_size} ids and the model {size}; use options of the task with which it has no more, "
            "or another run"
        )
    return data


def _show(found: Evaluation, of: str) -> None:
    tokens = "held-out tokens" if found.num_bytes is not None else f"answers of {found.task}"
    table = Table(title=f"{of}: {found.num_tokens:,} {tokens}")
    cells = []
    for name, value in found.named.items():
        title, form = COLUMNS.get(name, (name.replace("_", " "), ".4f"))
        table.add_column(title, justify="right")
        cells.append(f"{value:{form}}")
    table.add_row(*cells)
    console.print(table)
    table = Table(title="loss by position in the document")
    table.add_column("positions", justify="right")
    table.add_column("loss", justify="right")
    for first, last, loss in found.by_position():
        table.add_row(f"{first}-{last}" if last > first else str(first), f"{loss:.4f}")
    console.print(table)

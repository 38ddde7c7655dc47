"""`launch.py eval RUN --lm-eval TASK,...`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from rich.table import Table

from plait.configs.command_line.words import parse
from plait.configs.domains import Counted, Length, Line, Seed, Steps
from plait.configs.files import first_new, write_atomically
from plait.train.harness.asking import Asked, AskOptions
from plait.train.remote.reading import run_here
from plait.train.run import opened
from plait.train.terminal.console import console
from plait.train.terminal.results import check_new, keep

log = logging.getLogger("plait")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalArgs(AskOptions):
    """Scores a run on tasks of EleutherAI's lm-evaluation-harness (extra `eval`), from local files too."""

    ADDRESSES: ClassVar = ("run",)

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    lm_eval: Line
    """Comma-separated names of tasks, groups or tags."""
    include_path: Path | None = None
    """Folder of task files (YAML) beside those that come with lm-eval. Python functions that they name are run."""
    limit: Steps | None = None
    """Examples of a task; all by default."""
    num_fewshot: Counted | None = None
    """Examples before each question; by default as the task says."""
    max_gen_tokens: Length | None = None
    """Tokens of an answer, whatever the tasks say."""
    system: str | None = None
    """System message, or with no chat the text before all."""
    seed: Seed = 1234
    """Of the examples that are drawn, and of answers that are."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""
    out: Path | None = None
    """New file of the results; eval_STEP_lm-eval.json in the run folder by default."""
    samples: Path | None = None
    """New file (.jsonl) of each question, what was asked and what was found."""


def is_asked(args: Sequence[str]) -> bool:
    """Whether the words of `eval` are of this command."""
    return any(word.partition("=")[0].replace("_", "-") == "--lm-eval" for word in args)


def run(args: Sequence[str]) -> None:
    """Scores a run, shows the results and writes them to a file. The run folder gets nothing else."""
    options = parse(LmEvalArgs, args, prog="launch.py eval RUN --lm-eval TASK")
    names = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
    if not names:
        raise ValueError(f"lm_eval={options.lm_eval!r} must name tasks, with commas between them")
    for field, path in (("out", options.out), ("samples", options.samples)):
        check_new(field, path)
    for field, path, there in (
        ("include_path", options.include_path, Path.is_dir),
        ("chat_template", options.chat_template, Path.is_file),
    ):
        if path is not None and not there(path):
            raise ValueError(
                f"{field}={str(path)!r} is no {'folder' if there is Path.is_dir else 'file'} that is there; give one"
            )
    if options.chat_template is not None and not options.chat:
        raise ValueError(f"chat_template={str(options.chat_template)!r} is the template of a chat; add --chat, or leave it out")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"lm_eval={options.lm_eval!r} needs the package lm-eval, which is not installed; pip install 'plait[eval]'"
        )
    from plait.train.harness.adapter import VERSION, AskedLM, Tasks

    tasks = Tasks(names, options.include_path)
    options = dataclasses.replace(options, run=run_here(options.run, step=options.step))
    trained = opened(options.run, options.step)
    asked = Asked(trained, options)
    length = None if options.max_gen_tokens is None else {"max_gen_toks": options.max_gen_tokens}
    found = tasks.score(
        AskedLM(asked, options.seed),
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        gen_kwargs=length,
        system_instruction=options.system,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        log_samples=options.samples is not None,
    )
    _show(found, f"{options.run} at step {trained.step}: lm-eval {VERSION}")
    results = {"step": trained.step, "lm_eval": VERSION, "max_length": asked.max_length, **_kept(found)}
    results |= {"document_start": asked.texts.document_start, "chat": options.chat}
    if options.samples is not None:
        text = "".join(_lines(found["samples"]))
        kept = first_new(options.samples, lambda path: write_atomically(path, text, new=True))
        if kept != options.samples:
            log.warning("%s was made meanwhile, and stays; these samples are in %s", options.samples, kept)
    elsewhere = ("run", "step", "out", "samples")
    question = {name: value for name, value in dataclasses.asdict(options).items() if name not in elsewhere}
    keep(results, question, options.out, options.run / f"eval_{trained.step}_lm-eval.json")


def _kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of the results, under the names that they have there."""
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
    return json.loads(json.dumps({name: found[name] for name in kept if name in found}, default=float))


def _lines(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for task, every in samples.items():
        for one in every:
            yield json.dumps({"task": task, **one}, default=str) + "\n"


def _show(found: Mapping[str, Any], title: str) -> None:
    table = Table("task", "version", "examples before", "filter", "metric", "better", title=title)
    for name in ("value", "standard error"):
        table.add_column(name, justify="right")
    for task, results in found["results"].items():
        facts = [results.get("alias", task), str(found["versions"].get(task, "")), str(found["n-shot"].get(task, ""))]
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            higher = found["higher_is_better"].get(task, {}).get(metric)
            better = "" if higher is None else "higher" if higher else "lower"
            table.add_row(*facts, kind, metric, better, _number(value), _number(results.get(f"{metric}_stderr,{kind}", "")))
            facts = ["", "", ""]
    console.print(table)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

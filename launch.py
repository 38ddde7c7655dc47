"""The command line: `python launch.py COMMAND ...`. Exit status 0: done; 1: a run failed; 2: bad input."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

console = Console(soft_wrap=True)
USAGE = """usage: launch.py COMMAND ...

  train PRESET [--steps 2000] [--model.pattern "gla*3,softmax"] [--out runs/a] [--resume]   (train PRESET --help lists every option)
        [--hosts.local 2 | --hosts.coordinator HOST:PORT --hosts.count N --hosts.index I]                  on many hosts: docs/reliability.md
  plan PRESET --target v5p:4x8x8 [--slices N] [--search [--compile 2]] [--out plans/a] [any option of train]
  eval RUN [--tasks ppl] [--step N]
  generate RUN [--prompt "..."] [--num-tokens 200] [--temperature 0.8] [--top-k 40] [--top-p 0.9]
  report RUN [RUN ...] [--out FOLDER]
  write-launch gke|slurm|tpu-vm PRESET [train options] --target v5e:16x16 [--slices 2] [--out FOLDER]   (write-launch gke --help lists the rest)
  list presets|mixers|channel-mixers|optimizers|tasks|probes|kernels
"""


def train(args: Sequence[str]) -> int:
    """`train PRESET [overrides]`: here, or as one of several hosts in a process of its own that is watched."""
    from plait.train.pods.hosts import heartbeat
    from plait.train.pods.hosts.host import HostsOptions, find_host, host_options
    from plait.train.pods.hosts.supervise import supervise

    if not args or args[0].startswith("-"):
        raise ValueError("train needs a preset first, as in 'launch.py train lm_quick'; 'launch.py list presets' shows them")
    options, rest = host_options(args)
    supervised = heartbeat.VARIABLE in os.environ
    if not supervised and options.local:
        return supervise(["train", *args], None, options)
    host = find_host(HostsOptions() if options.local else options)
    if host is not None and not supervised:
        return supervise(["train", *args], host, options)
    heartbeat.start()
    if host is None:
        return _train(rest, supervised)
    from plait.train.pods.hosts import together

    with together.joined(host, options.connect_seconds) as leave:
        return leave(_status(lambda: _train(rest, supervised)))


def _train(args: Sequence[str], supervised: bool) -> int:
    from plait.configs.cli import parse_experiment
    from plait.train.loop import train as run_training
    from plait.train.pods.hosts import together
    from plait.train.pods.hosts.supervise import DONE, STOPPED
    from plait.train.report import write_report

    if not together.first():
        logging.getLogger("plait").setLevel(logging.WARNING)
    with together.together("options"):
        config = parse_experiment(args[0], args[1:])
    result = run_training(config)
    if not result.finished:
        console.print(f"stopped and saved at step {result.step}; --resume goes on", markup=False)
        return STOPPED if supervised else DONE
    with together.together("report"):
        if together.first():
            if "loss/bits_per_byte" in result.metrics:
                console.print(f"validation: {result.metrics['loss/bits_per_byte']:.4f} bits per byte", markup=False)
            if together.count() == 1:  # a process cannot lead a model that lies on the devices of others
                _generate(
                    GenerateArgs(
                        run=result.folder, prompt="Fellow citizens," if config.data.source == "sotu" else "", num_tokens=60
                    )
                )
            console.print(f"report: {write_report([result.folder])}", markup=False)
    return DONE


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Says what a preset's training step takes on TPUs or GPUs that are not at hand: memory, operations, exchange, time at best.

    The step is compiled ahead of time, kernels included. Every option of `train PRESET` may follow.
    """

    target: str
    """TPU slice or GPUs, as v5e:16x16, v5p:4x8x8, h100:8x8 or h100x64; cpu:8 for devices of this machine."""
    slices: int = 1
    """TPU slices of that shape, joined by the network."""
    search: bool = False
    """Also tries other meshes, recomputation and micro-batches, and ranks those that fit."""
    compile: int = 2
    """With --search: layouts to compile, the best by estimate."""
    out: Path | None = None
    """Folder of plan.md and plan.json; plans/PRESET-TARGET by default."""


def plan(args: Sequence[str]) -> None:
    """`plan PRESET --target TARGET [overrides]`."""
    from plait.configs.options import split_options
    from plait.train.pods.plan.topology import KNOWN

    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise ValueError("plan needs a preset first, as in 'launch.py plan hybrid_1b --target v5e:16x16'")
    mine, rest = split_options(PlanArgs, args)
    if not {"-h", "--help"} & set(mine) and not any(word.split("=")[0] == "--target" for word in mine):
        raise ValueError(f"plan needs a --target\nknown targets:\n{KNOWN}")
    options = tyro.cli(PlanArgs, args=mine, prog="launch.py plan PRESET [train overrides]")  # --help ends here
    from plait.configs.cli import parse_experiment
    from plait.train.pods.plan.command import run_plan

    config = parse_experiment(rest[0], rest[1:], prog="launch.py plan")
    search = options.compile if options.search else None
    run_plan(config, options.target, slices=options.slices, search=search, out=options.out, console=console)


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Scores a run on its held-out text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    tasks: str = "ppl"
    """Comma-separated; `list tasks` shows them."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    batches: int | None = None
    """Batches of held-out text; all by default."""


def evaluate(args: Sequence[str]) -> None:
    """`eval RUN`."""
    options = tyro.cli(EvalArgs, args=list(args), prog="launch.py eval")
    from plait.train.evaluate import Evaluator, check_tasks
    from plait.train.run import opened, write_json

    check_tasks(options.tasks)
    with opened(options.run, options.step) as run:
        data = run.setup.data
        found = Evaluator(run.setup.blueprint, run.setup.mesh)(run.params, run.buffers, data.val, data.tokenizer, options.batches)
        table = Table(title=f"{options.run} at step {run.step}: {found.num_tokens:,} held-out tokens")
        for column in ("loss (nats/token)", "perplexity", "bits per byte"):
            table.add_column(column, justify="right")
        table.add_row(f"{found.loss:.4f}", f"{found.perplexity:.2f}", f"{found.bits_per_byte:.4f}")
        console.print(table)
        table = Table(title="loss by position in the document")
        table.add_column("positions", justify="right")
        table.add_column("loss", justify="right")
        for first, last, loss in found.by_position():
            table.add_row(f"{first}-{last}" if last > first else str(first), f"{loss:.4f}")
        console.print(table)
        write_json(options.run / f"eval_{run.step}.json", {"step": run.step, "ppl": found.to_json()})


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continues a text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    prompt: str = ""
    """Text to go on from; empty starts a document."""
    num_tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    step: int | None = None
    """Checkpoint; the newest by default."""


def generate(args: Sequence[str]) -> None:
    """`generate RUN`."""
    _generate(tyro.cli(GenerateArgs, args=list(args), prog="launch.py generate"))


def _generate(options: GenerateArgs) -> None:
    from plait.train.generate import Sampling, generate_text
    from plait.train.run import opened

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    with opened(options.run, options.step) as run:
        model = run.setup.blueprint.build(run.params, run.buffers)
        config = run.setup.config.data
        (text,) = generate_text(
            model,
            run.setup.data.tokenizer,
            [options.prompt],
            num_tokens=options.num_tokens,
            sampling=sampling,
            document_start=config.document_start,
            seed=options.seed,
            mesh=run.setup.mesh,
        )
    console.print(options.prompt + text, markup=False, highlight=False)


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Writes the page that shows one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """Folder of the page; `report/` in the run, or beside the first of several, by default."""


def report(args: Sequence[str]) -> None:
    """`report RUN...`."""
    options = tyro.cli(ReportArgs, args=list(args), prog="launch.py report")
    from plait.train.report import write_report

    if not options.runs:
        raise ValueError("report needs at least one run folder")
    console.print(f"report: {write_report(list(options.runs), options.out)}", markup=False)


def write_launch(args: Sequence[str]) -> None:
    """`write-launch gke|slurm|tpu-vm PRESET [train overrides]`."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # looks at no accelerator that is here
    from plait.train.pods import launch_files

    path, job = launch_files.write_launch(args)
    console.print(f"{path}: {job.machines.describe()}; its first lines say how to submit, watch, resume and delete", markup=False)


def list_things(args: Sequence[str]) -> None:
    """`list WHAT`."""
    from plait.configs import listing

    if len(args) != 1 or args[0] not in listing.TABLES:
        raise ValueError(f"list needs one of {', '.join(listing.TABLES)}, not {' '.join(args) or 'nothing'}")
    console.print(listing.TABLES[args[0]]())


COMMANDS = {
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "generate": generate,
    "report": report,
    "write-launch": write_launch,
    "list": list_things,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_time=False, show_path=False)]
    )
    logging.getLogger("plait").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's running commentary
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        print(f"error: {argv[0]!r} is not a command{f'; did you mean {near[0]!r}?' if near else ''}\n\n{USAGE}", file=sys.stderr)
        return 2
    return _status(lambda: COMMANDS[argv[0]](argv[1:]))


def _status(command: Callable[[], int | None]) -> int:
    """The exit status of a command, after its error is printed."""
    from plait.train.pods.hosts.failure import TrainingFailed

    try:
        return command() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, OSError) as error:
        print(f"error: {error}; what was saved before stays", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

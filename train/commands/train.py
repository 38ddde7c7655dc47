"""`launch.py train PRESET [overrides]`. Needs no JAX where it only supervises other processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from plait.train.pods.hosts.on_hosts import on_hosts
from plait.train.pods.hosts.supervise import DONE, ENDED, STOPPED
from plait.train.terminal.console import console, show_text
from plait.train.terminal.output import outliving_readers

USUAL = "lm_quick"
"""The preset of `make train`."""


def run(args: Sequence[str]) -> int:
    """Trains here, or as one of several hosts in a process of its own that is watched."""
    if args and args[0] in ("-h", "--help"):
        args = [USUAL, "--help"]  # the options are those of every preset, the defaults its own
    if not args or (args[0].startswith("-") and not any(re.match("--(init[-_]from|branch)(=|$)", word) for word in args)):
        raise ValueError(
            "train needs a preset first, as in 'launch.py train lm_quick', or --init-from RUN, or --branch RUN/checkpoints/STEP; "
            "'launch.py list presets' shows presets"
        )
    with outliving_readers():
        return on_hosts("train", args, _train, resumes=True)


def _train(args: Sequence[str], supervised: bool) -> int:
    from plait.train.commands.generate import GenerateArgs, continued
    from plait.train.loop import train
    from plait.train.origin import parse_run
    from plait.train.pods.hosts import together

    if not together.first():
        logging.getLogger("plait").setLevel(logging.WARNING)
    with together.together("options"):
        config = parse_run(args)
    result = train(config)
    if result.by_event:
        console.print(f"stopped by an event and saved at step {result.step}; --resume goes on", markup=False)
        with together.together("report"):
            if together.first():
                _report(config.out, result.folder)
        return ENDED
    if not result.finished:
        console.print(f"stopped and saved at step {result.step}; --resume goes on", markup=False)
        return STOPPED if supervised else DONE
    with together.together("report"):
        if together.first():
            if found := _validation(result.metrics):
                console.print(f"validation: {found}", markup=False)
            alone = together.count() == 1  # a process cannot lead a model that lies on others' devices
            if config.data.task.reads_text and config.model.causal and alone:
                prompt = "Fellow citizens," if config.data.source == "sotu" else ""
                show_text(continued(GenerateArgs(run=result.folder, prompt=prompt, num_tokens=60)))
            _report(config.out, result.folder)
    return DONE


def _report(out: str | None, folder: Path) -> None:
    """Writes the page of a run that has ended, where its store is too, and says where."""
    from plait.train.remote.session import push_folder
    from plait.train.report import write_report

    page = write_report([folder])
    push_folder(out, page.parent.name)
    console.print(f"report: {page}", markup=False)


def _validation(metrics: dict[str, float]) -> str:
    """The last validation in words; empty where there was none."""
    if "loss/bits_per_byte" in metrics:
        return f"{metrics['loss/bits_per_byte']:.4f} bits per byte"
    return ", ".join(f"{name.removeprefix('task/')} {value:.4f}" for name, value in metrics.items() if name.startswith("task/"))

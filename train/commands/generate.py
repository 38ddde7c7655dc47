"""`launch.py generate RUN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from plait.configs.command_line.words import parse
from plait.configs.domains import Counted, Length, Part, Seed, Temperature, Vocabulary
from plait.train.terminal.console import write_text


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continues a text with a trained model."""

    ADDRESSES: ClassVar = ("run",)

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    prompt: str = ""
    """Text to go on from; empty starts a document."""
    num_tokens: Length = 200
    """Tokens to write."""
    temperature: Temperature = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Vocabulary | None = None
    """Draw among this many likeliest tokens."""
    top_p: Part | None = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: Seed = 0
    """Of the draws."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""


def run(args: Sequence[str]) -> None:
    """Continues a prompt and writes the text, and nothing else, to standard output."""
    write_text(continued(parse(GenerateArgs, args, prog="launch.py generate")))


def continued(options: GenerateArgs) -> str:
    """The prompt and its continuation. Raises ValueError for a run that was not trained on text, or a prompt that is none."""
    from plait.train.remote.reading import run_here
    from plait.train.run import opened
    from plait.train.scoring.generate import Sampling, generate_text

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    trained = opened(run_here(options.run, step=options.step), options.step)
    data = trained.program.config.data
    if trained.tokenizer is None:
        raise ValueError(
            f"{str(options.run)!r} was trained on data.task={data.task.name}, whose tokens are no text; "
            "give a run that was trained on text, or see what it can with launch.py eval"
        )
    (text,) = generate_text(
        trained.program.blueprint.build(trained.params, trained.buffers),
        trained.tokenizer,
        [options.prompt],
        num_tokens=options.num_tokens,
        sampling=sampling,
        document_start=data.document_start,
        seed=options.seed,
        mesh=trained.program.mesh,
        landmarks=data.task.landmarks(trained.tokenizer.vocab_size),
    )
    return options.prompt + text

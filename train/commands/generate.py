"""`launch.py generate RUN`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from plait.configs.domains import Counted, Length, Number, Seed, Vocabulary
from plait.configs.words import parse
from plait.train.commands.console import console


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continues a text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    prompt: str = ""
    """Text to go on from; empty starts a document."""
    num_tokens: Length = 200
    """Tokens to write."""
    temperature: Annotated[float, Number(least=0, most=1e6)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Vocabulary | None = None
    """Draw among this many likeliest tokens."""
    top_p: Annotated[float, Number(above=0, most=1)] | None = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: Seed = 0
    """Of the draws."""
    step: Counted | None = None
    """Checkpoint; the newest by default."""


def run(args: Sequence[str]) -> None:
    """Continues a prompt and prints the text."""
    generate(parse(GenerateArgs, args, prog="launch.py generate"))


def generate(options: GenerateArgs) -> None:
    """Prints the prompt and its continuation. Raises ValueError for a run that was not trained on text."""
    from plait.train.generate import Sampling, generate_text
    from plait.train.run import opened

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    with opened(options.run, options.step) as trained:
        data = trained.setup.data
        if data.tokenizer is None:
            raise ValueError(
                f"{str(options.run)!r} was trained on data.task={data.config.task.name}, whose tokens are no text; "
                "give a run that was trained on text, or see what it can with launch.py eval"
            )
        (text,) = generate_text(
            trained.setup.blueprint.build(trained.params, trained.buffers),
            data.tokenizer,
            [options.prompt],
            num_tokens=options.num_tokens,
            sampling=sampling,
            document_start=data.config.document_start,
            seed=options.seed,
            mesh=trained.setup.mesh,
        )
    console.print(options.prompt + text, markup=False, highlight=False)

"""From softmax attention to a hybrid in one go: copy, teach, put in place, tune; each stage a run folder of its own that goes on where it
ended."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.configs import codec
from plait.configs.files import read_json
from plait.train.convert.reshapes.base import Subject
from plait.train.convert.reshapes.linearize import Linearize
from plait.train.convert.reshapes.students import Students
from plait.train.convert.reshaping import reshape_run
from plait.train.convert.weights import ConvertError
from plait.train.loop import train
from plait.train.origin import parse_run
from plait.train.report import write_report
from plait.train.run import described, opened, write_json
from plait.train.run_folder.contents import CONFIG
from plait.train.scoring.evaluate import Evaluator
from plait.train.scoring.held_out import OtherText, held_out

COPIED, TAUGHT, TRANSFER, HYBRID, TUNED = "copied", "taught", "transfer", "hybrid", "tuned"
"""Run folders: weights copied alone; students beside their teachers, at first and after attention transfer; in place, at first and after
tuning."""
ASKED, RESULT = "asked.json", "linearize.json"
TRANSFER_WORDS = ("--optimizer.learning-rate", "1e-2")
TUNE_WORDS = ("--optimizer.learning-rate", "1e-4", "--model.lora.rank", "8")
"""As LoLCATs trains its two stages (arXiv 2410.10254)."""


@dataclasses.dataclass(frozen=True)
class Linearized:
    """What came of it."""

    losses: dict[str, float]
    """Nats per held-out token of the teacher, the copied, the taught and the tuned model."""
    trained: dict[str, int]
    """Parameters that each stage trained."""
    tokens: dict[str, int]
    """That each stage read."""

    @property
    def closed(self) -> float:
        """Share of the loss between teacher and copied weights that is made up for."""
        lost = self.losses[COPIED] - self.losses["teacher"]
        return (self.losses[COPIED] - self.losses[TUNED]) / lost if lost > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        perplexity = {name: math.exp(loss) for name, loss in self.losses.items()}
        closed = None if math.isnan(self.closed) else self.closed
        return {**dataclasses.asdict(self), "perplexity": perplexity, "gap_closed": closed}


def linearize(
    source: Path, folder: Path, how: Linearize, words: Sequence[str], transfer: Sequence[str], tune: Sequence[str]
) -> Linearized | None:
    """Makes the runs in `folder`, or goes on with them. None where a signal ended it, after saving.

    Args:
        words: options of both trainings, as of `launch.py train`; those of one stage in `transfer` and `tune`.

    Raises:
        ConvertError: the model cannot be linearised so, or `folder` was begun otherwise.
    """
    runs = {name: folder / name for name in (COPIED, TAUGHT, TRANSFER, HYBRID, TUNED)}
    before, _ = described(source)
    how.model(Subject(before.model, before.model.vocab_size or 1, before.data.seq_len))  # refuses before anything is written
    options = {name: value for name, value in codec.encode(how).items() if value is not None}
    asked = {"source": str(source.resolve()), "how": options, "words": [*words], TRANSFER: [*transfer], TUNED: [*tune]}
    _begin(folder, runs, asked)
    _once(runs[COPIED], lambda: reshape_run(source, runs[COPIED], dataclasses.replace(how, teach=False)))
    _once(runs[TAUGHT], lambda: reshape_run(source, runs[TAUGHT], dataclasses.replace(how, teach=True)))
    stages = {TRANSFER: (TAUGHT, TRANSFER_WORDS, transfer), TUNED: (HYBRID, TUNE_WORDS, tune)}

    def config(name: str, origin: str) -> Any:
        _, defaults, own = stages[name]
        given = ["--init-from", str(runs[origin]), "--out", str(runs[name]), "--resume", *words, *own]
        return parse_run([*given, *_left_open(defaults, given)])

    config(TUNED, COPIED)  # of the same model: what is wrong with it is said before hours of training
    if not train(config(TRANSFER, TAUGHT)).finished:
        return None
    _once(runs[HYBRID], lambda: reshape_run(runs[TRANSFER], runs[HYBRID], Students()))
    if not train(config(TUNED, HYBRID)).finished:
        return None
    found = _compare(source, runs)
    write_json(folder / RESULT, found.to_json())
    write_report([runs[TRANSFER]])  # layer by layer
    write_report([runs[TRANSFER], runs[TUNED]], folder / "report")
    return found


def _left_open(defaults: Sequence[str], given: Sequence[str]) -> list[str]:
    """The defaults, option and value by turns, that are not given."""
    named = {word.partition("=")[0].replace("_", "-") for word in given}
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in named for word in pair]


def _begin(folder: Path, runs: dict[str, Path], asked: dict[str, Any]) -> None:
    """Raises ConvertError where the folder is of something else. Other options can be given until training has begun."""
    path = folder / ASKED
    if path.is_file():
        before = read_json(path)
        if before == asked:
            return
        if (runs[TRANSFER] / CONFIG).exists():
            changed = ", ".join(name for name in asked if before.get(name) != asked[name])
            raise ConvertError(
                f"{str(folder)!r} was begun with other options ({changed}: see {path}); give those, or a new folder"
            )
        for name in (COPIED, TAUGHT):
            shutil.rmtree(runs[name], ignore_errors=True)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvertError(f"{str(folder)!r} is there already and no linearisation; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def _once(run: Path, make: Callable[[], Any]) -> None:
    """Makes a run folder, which appears when it is whole, if it is not there."""
    if not run.exists():
        make()


def _compare(source: Path, runs: dict[str, Path]) -> Linearized:
    """The models on the rows that the last stage held out."""
    last = opened(runs[TUNED])
    losses = {}
    with tempfile.TemporaryDirectory(prefix="plait-") as scratch:
        data = held_out(last, last.program.config.data.task, OtherText(), Path(scratch))
        for name, run in {"teacher": source, COPIED: runs[COPIED], HYBRID: runs[HYBRID], TUNED: runs[TUNED]}.items():
            one = last if name == TUNED else opened(run, rows_of=last.program.config)
            losses[name] = Evaluator(one.program.blueprint, one.program.mesh, data)(one.params, one.buffers, data.val, None).loss
    stages = {name: opened(runs[name]).program for name in (TRANSFER, TUNED)}
    return Linearized(
        losses,
        {name: program.blueprint.num_trained for name, program in stages.items()},
        {name: p.config.steps * p.config.data.batch_size * p.config.data.seq_len for name, p in stages.items()},
    )

"""A checkpoint on a text: probes, tokens and needles, of the model as it is and without heads."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plait.configs.files import first_new, write_atomically
from plait.configs.probe import ProbeConfig
from plait.data.batch import Batch
from plait.train.convert.sample import ids_of, rows_of
from plait.train.inspection.heads import Head, InspectError, Masking, check_maskable, drawn, maskable, named_heads
from plait.train.inspection.looking import probing
from plait.train.inspection.needles import Recall, needles_of, recalling
from plait.train.inspection.options import InspectOptions
from plait.train.inspection.tokens import TokenByToken, token_by_token
from plait.train.inspection.window import Window, window_of
from plait.train.probes.base import Probes
from plait.train.probes.collect import padded_layers, probe_arrays
from plait.train.run import Trained, opened
from plait.train.run_folder.contents import CHECKPOINTS
from plait.train.run_folder.lines import strict

log = logging.getLogger("plait")

RESULTS = "inspection.json"
_LENGTH = 512
_SHARE = 0.05
_EVERY = 2**20
_SETS = ("retrieval", "random")  # of heads that are left out


@dataclasses.dataclass(frozen=True)
class Found:
    """What one model does, with all heads or without some."""

    masking: Masking
    loss: float
    """Nats per token."""
    recall: Recall
    statistics: dict[str, np.ndarray]
    """`[L, ...]`, NaN where a layer or head has none."""
    tokens: TokenByToken

    def to_json(self, heads: tuple[Head, ...]) -> dict[str, Any]:
        """All numbers; of attention those of some heads."""
        needles = {"tokens": self.recall.tokens, "whole": self.recall.whole, "retrieval_heads": self.recall.found}
        return {
            "name": self.masking.name,
            "masked": [f"{layer}.{head}" for layer, head in self.masking.heads],
            "loss": self.loss,
            "perplexity": math.exp(self.loss) if self.loss < 700 else math.inf,
            "needles": needles,
            "statistics": {name: values.tolist() for name, values in self.statistics.items()},
            "token_by_token": self.tokens.to_json(heads),
        }


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All of it."""

    run: Path
    trained: Trained
    options: InspectOptions
    read: int
    """Tokens of the text that were read,"""
    of: int
    """and that it has."""
    length: int
    """Tokens of a row."""
    window: Window
    """What is looked at token by token."""
    needles: int
    prompt_length: int
    heads: tuple[Head, ...]
    """Whose attention is shown, where some were named."""
    models: list[Found]
    """The model as it is, then without heads."""

    @property
    def part(self) -> str:
        """How much of the text was read, in words."""
        return f"all {self.of:,}" if self.read >= self.of else f"the first {self.read:,} of {self.of:,}"

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        facts: dict[str, Any] = {
            "run": str(self.run),
            "step": self.trained.step,
            "text": str(self.options.text),
            "tokens": self.of,
        }
        facts |= {"read": self.read, "length": self.length, "needles": self.needles, "prompt_length": self.prompt_length}
        return {**facts, "models": [one.to_json(self.heads) for one in self.models]}


def inspect(run: Path, options: InspectOptions) -> tuple[Inspection, Path]:
    """What was found, and the report, which is written with all numbers to a new folder.

    Raises:
        ValueError: no such run, text or head, or a folder that is there, before anything is compiled.
    """
    run, step = _checkpoint(run, options.step)
    if options.probe.sequences != ProbeConfig().sequences:
        raise InspectError(f"probe.sequences={options.probe.sequences} is of training: here all rows are looked at; use --rows")
    observer = Probes(dataclasses.replace(options.probe, sequences=_EVERY))
    trained = opened(run, step)
    config, model = trained.program.config, trained.program.config.model
    out = options.out or run / f"inspect_{trained.step}"
    _check_new(out)
    if trained.tokenizer is None:
        raise InspectError(
            f"{str(run)!r} was trained on data.task={config.data.task.name}, whose tokens are no text; give a run that was trained on text"
        )
    if not model.causal:
        raise InspectError("model.causal=False has no next token to be scored; inspect a causal model")
    heads = () if options.heads is None else named_heads("heads", options.heads, model)
    _check_masks(options, trained)
    text = ids_of(options.text, trained)
    start = trained.tokenizer.bos_id if config.data.document_start else None
    whole = _row_length(options, trained)
    length = options.length or min(whole, len(text) + 1)
    window = window_of(options.tokens, text, length, start)
    needles = needles_of(trained, text, options.needle, options.needle.length or whole, start, options.seed)
    _, rows = rows_of(config, trained.program.mesh, min(options.rows, -(-(len(text) + 1) // length)))
    batch = rows_of_text(text, rows, length, start, trained.tokenizer.eos_id)

    probe, recall = probing(trained, observer), recalling(trained, needles)
    look = token_by_token(trained, window, trained.tokenizer.token_strings(window.ids[window.before :]))

    def found(masking: Masking) -> Found:
        log.info("looking at %s", masking.name)
        kept = masking.kept(model)
        nll, layers = jax.device_get(probe(batch, kept))
        recalled = recall(kept)
        widest = max(map(len, recalled.scores))
        arrays = {**probe_arrays(layers), "retrieval": padded_layers(recalled.scores, (widest,))}
        return Found(masking, float(nll.sum() / batch.loss_mask.sum()), recalled, arrays, look(kept))

    models = [found(Masking("all heads"))]
    models += [found(masking) for masking in _maskings(options, trained, models[0].recall)]
    read, (prompts, size) = min(rows * length, len(text)), needles.ids.shape
    inspection = Inspection(run, trained, options, read, len(text), length, window, prompts, size, heads, models)
    made = first_new(out, lambda folder: folder.mkdir(parents=True), folder=True)
    if made != out:
        log.warning("%s was made meanwhile, and stays; this inspection is in %s", out, made)
    write_atomically(made / RESULTS, json.dumps(strict(inspection.to_json())) + "\n")
    from plait.train.report.inspection import write_inspection

    return inspection, write_inspection(inspection, made)


def rows_of_text(ids: np.ndarray, rows: int, length: int, start: int | None, end: int) -> Batch:
    """The first rows of a text, each a document of its own; rows after its end are padding.

    With a `start` token before each row every token is predicted; without, the first of each row is not. After the text's last token the
    `end` comes.
    """
    stream = np.append(ids, end)[: rows * length + (start is None)].astype(np.int32)
    targets = stream if start is not None else stream[1:]
    cut = lambda x: np.pad(x, (0, rows * length - len(x))).reshape(rows, length)
    mask = cut(np.ones(len(targets), np.int32))
    targets = cut(targets)
    if start is not None:
        tokens = np.concatenate([np.full((rows, 1), start, np.int32), targets[:, :-1]], axis=1) * mask
    else:
        tokens = cut(stream[: len(stream) - 1])
    return Batch(tokens, targets, mask, np.arange(length, dtype=np.int32) * mask, mask.astype(np.float32))


def _checkpoint(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run folder and the step that a path means: a run, or one of its checkpoints. Raises InspectError where they differ."""
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        if step not in (None, int(path.name)):
            raise InspectError(f"step={step} is another than that of the checkpoint {str(path)!r}; leave one of them out")
        return path.parent.parent, int(path.name)
    return path, step


def _check_new(out: Path) -> None:
    """Raises InspectError where a folder cannot be made."""
    if out.exists():
        raise InspectError(f"out={str(out)!r} is there already; give another --out, or delete it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is a folder that you may not write to" if above.is_dir() else "is a file"
        raise InspectError(f"out={str(out)!r} cannot be made, as {str(above)!r} {why}; give another --out")


def _row_length(options: InspectOptions, trained: Trained) -> int:
    """Tokens of a row of a text that has so many. Raises InspectError where the model has no places for so many."""
    config = trained.program.config
    positions = config.model.positions
    longest = [mixer.longest for mixer in config.model.layer_mixers] + ([] if positions is None else [positions.longest])
    most = min((one for one in longest if one is not None), default=None)
    for name, asked in (("length", options.length), ("needle.length", options.needle.length)):
        if asked is not None and most is not None and asked > most:
            raise InspectError(
                f"{name}={asked} is more than the {most} tokens that the model has positions for; use {most} or less"
            )
    return options.length or min(config.data.seq_len, _LENGTH)


def _count(options: InspectOptions, there: int) -> int:
    return math.ceil(_SHARE * there) if options.mask_count is None else options.mask_count


def _check_masks(options: InspectOptions, trained: Trained) -> None:
    """Raises InspectError where heads are to be left out that cannot be."""
    asked, model = options.mask_heads, trained.program.config.model
    if asked not in _SETS:
        if options.mask_count is not None:
            raise InspectError(
                f"mask_count={options.mask_count} is of --mask-heads retrieval or random; "
                + ("name one of them" if asked is None else "leave it out, or name as many heads")
            )
        if asked is not None:
            check_maskable("mask_heads", asked, named_heads("mask_heads", asked, model, _SETS), model)
        return
    there = len(maskable(model))
    most = there // 2 if asked == "retrieval" else there
    if not 0 < _count(options, there) <= most:
        if not there:
            raise InspectError(
                f"mask_heads={asked!r}: model.pattern={model.pattern!r} has no heads before an output projection, so none can be left out; "
                "use a model that has"
            )
        raise InspectError(
            f"mask_count={_count(options, there)} must be from 1 to {most}, as the model has {there} heads"
            + (" and as many others are compared" if asked == "retrieval" else "")
        )


def _maskings(options: InspectOptions, trained: Trained, recall: Recall) -> Iterator[Masking]:
    """The models without heads that are compared with the whole one."""
    asked, model = options.mask_heads, trained.program.config.model
    if asked is None:
        return
    if asked not in _SETS:
        heads = named_heads("mask_heads", asked, model, _SETS)
        yield Masking(f"without {asked}" if len(heads) <= 4 else f"without {len(heads)} named heads", heads)
        return
    there, rng = maskable(model), np.random.default_rng(options.seed)
    count, best = _count(options, len(there)), tuple[Head, ...]()
    if asked == "retrieval":
        best = recall.best(there, count)
        if not best:
            log.warning("no head copies a needle, of whose tokens %.0f%% are recalled: nothing is left out", 100 * recall.tokens)
            return
        count = len(best)
        yield Masking(f"without {count} retrieval heads", best)
    others = [head for head in there if head not in best]
    yield Masking(f"without {count} random heads", drawn(rng, others, count))

"""What the page of a sweep says first: which arm is best and by how much, whether its numbers are at an edge, and on what it was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.configs.files import read_json
from plait.train.report.page import sentences
from plait.train.run_folder.contents import ENVIRONMENT
from plait.train.scoring.extent import words as extent
from plait.train.sweep.arms import RATE, Arm
from plait.train.sweep.better import Better
from plait.train.sweep.record import Sweep
from plait.train.sweep.verdict import Entry, ranked, verdict
from plait.train.sweep.workers import claims

WORDS = {"loss/val": "validation loss", "loss/train": "training loss"}
MOST_TRIED = 8


def name(arm: Arm) -> str:
    """What sets an arm apart."""
    last = [key.rpartition(".")[2] for key in arm.keys]
    short = [key if last.count(end) > 1 else end for key, end in zip(arm.keys, last)]
    return ", ".join(f"{key} = {value}" for key, value in zip(short, arm.keys.values())) or "the preset"


def best_first(found: Sequence[Arm], better: Better) -> list[Arm]:
    """Arms without a value stand last."""
    order = sorted((arm for arm in found if arm.values), key=lambda arm: arm.estimate.mean, reverse=better == "higher")
    return [*order, *(arm for arm in found if not arm.values)]


def opening(folder: Path, sweep: Sweep, found: Sequence[Arm], metric: str, better: Better) -> str:
    """Topics with a sentence each."""
    entries = [Entry(name(arm), arm.values) for arm in found]
    told: dict[str, str] = {}
    if text := verdict(entries, WORDS.get(metric, metric), better, "arm"):
        told["Best"] = text[0].upper() + text[1:]
        if any(not arm.values for arm in found):
            told["Best"] += f" {sum(not arm.values for arm in found)} of {len(found)} arms have no value."
    elif there := ranked(entries):
        told["Best"] = f"Only one arm has {metric}: {there[0].name}, {there[0].mean:.3f}."
    if edges := at_the_edge(found, better):
        told["Edge"] = edges
    if metric.startswith(("loss/val", "loss/bits", "position/")) and (text := _validated(folder, found)):
        told["Validation"] = text
    if metric != "loss/train" and _own_text(sweep):
        told["Held-out text"] = (
            "Which documents are held out differs between the seeds (data.seed decides it where data.split_seed is not given), so that the "
            "spread over seeds is of texts too; pairs of the same seeds are of the same text. --data.split-seed 0 holds out the same for all."
        )
    return sentences(told)


def at_the_edge(found: Sequence[Arm], better: Better) -> str:
    """Which swept numbers of the best arm are the smallest or largest that gave a result; empty where none is."""
    there = best_first([arm for arm in found if arm.values], better)
    told = []
    for key, value in there[0].keys.items() if len(there) > 1 else ():
        tried = sorted({arm.keys[key] for arm in there if _is_number(arm.keys[key])})
        if not _is_number(value) or len(tried) < 2 or value not in (tried[0], tried[-1]):
            continue
        which, further = ("smallest", "smaller") if value == tried[0] else ("largest", "larger")
        values = ", ".join(f"{one:g}" for one in tried) if len(tried) <= MOST_TRIED else f"{tried[0]:g} to {tried[-1]:g}"
        told.append(f"{key} = {value:g} of the best arm is the {which} that was tried ({values}); a {further} one may be better.")
    return " ".join(told)


def hint(found: Sequence[Arm]) -> str:
    """What `--baseline` is for, by a key of this sweep; empty where no key varies."""
    keys = [key for key in found[0].keys if key != RATE] or list(found[0].keys)
    if not keys:
        return ""
    wanted = shlex.quote(f"{keys[0]}={found[0].keys[keys[0]]}")
    return f" With --baseline {wanted} each arm is compared with the one that has this and is otherwise the same, and the speed-up is told."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _validated(folder: Path, found: Sequence[Arm]) -> str:
    """On how much the runs that count were validated."""
    told: dict[str, int] = {}
    for arm in found:
        for seeds in arm.values:
            if text := extent(_environment(claims.run_folder(folder, arm.runs[seeds]))):
                told[text] = told.get(text, 0) + 1
    if len(told) < 2:
        return "".join(f"Measured on {text}." for text in told)
    return "Measured on " + "; ".join(f"{text} in {count} runs" for text, count in list(told.items())[:4]) + "."


def _environment(run: Path) -> Mapping[str, object]:
    try:
        found = read_json(run / ENVIRONMENT)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _own_text(sweep: Sweep) -> bool:
    """Whether runs hold out parts of a text by more than one seed."""
    datas = [run.config.data for run in sweep.runs]
    text = [one for one in datas if one.val_fraction and any(part.task.reads_text for part in (one, *one.parts.values()))]
    return len({one.seed_of_split for one in text}) > 1

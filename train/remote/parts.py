"""What of a run folder lies in a store, and in which order it goes there: at every moment the store holds a run folder that is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from plait.data.remote.store import StoreError
from plait.data.tokenizers.tokenizer import META_FILE
from plait.train.run_folder.contents import BRANCH, CHECKPOINTS, CONFIG, ENVIRONMENT, MARK, ORIGIN, ORIGINALS
from plait.train.run_folder.lines import EVENTS, METRICS
from plait.train.run_folder.owner import OWNER
from plait.train.run_folder.probe_files import PROBES
from plait.train.run_folder.seal import MANIFEST

_MARK = f"{CHECKPOINTS}/{MARK}"
_FIRST = (_MARK, CONFIG, "tokenizer/tokenizer.json", f"tokenizer/{META_FILE}")
"""In this order before all others, each of which says something only beside them."""
_HERE = (OWNER, "data", "wandb", CHECKPOINTS)
"""What stays on this machine (tokens can be made again), or has ways of its own."""
_OURS = (
    CONFIG,
    ENVIRONMENT,
    ORIGIN,
    BRANCH,
    METRICS,
    EVENTS,
    PROBES,
    ORIGINALS,
    "tokenizer",
    "tensorboard",
    "report",
    "wandb_id",
)


def files_of(folder: Path) -> list[str]:
    """The names of the files of a run folder but its checkpoints', in the order in which they go to a store."""
    names = [
        path.relative_to(folder).as_posix()
        for entry in sorted(folder.iterdir())
        if entry.name not in _HERE and not entry.name.startswith(".")
        for path in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])
        if path.is_file() and not path.name.startswith(".")
    ]
    if (folder / _MARK).is_file():
        names.append(_MARK)
    return sorted(names, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def is_of_a_run(name: str) -> bool:
    """Whether an object is one that a run has written, and no checkpoint's; a store may hold more in the folder."""
    top = name.partition("/")[0]
    ours = top in _OURS or top.startswith("unsaved-") or (top.startswith("eval_") and top.endswith(".json")) or name == _MARK
    return ours and not any(part.startswith(".") for part in name.split("/"))


def goes_before(name: str) -> bool:
    """Whether a file has to be there before any that follows it."""
    return name in _FIRST


def whole_steps(names: Iterable[str]) -> list[int]:
    """The steps whose checkpoints are all there among the objects of a run, ascending."""
    found = (name.split("/") for name in names)
    return sorted(
        int(parts[1])
        for parts in found
        if len(parts) == 3 and parts[0] == CHECKPOINTS and parts[1].isdecimal() and parts[2] == MANIFEST
    )


def checkpoint(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{CHECKPOINTS}/{step}"


def of_checkpoint(names: Iterable[str], step: int) -> Iterator[str]:
    """Those of the objects that are a checkpoint's."""
    return (name for name in names if name.startswith(f"{checkpoint(step)}/"))


def check_holds(names: Iterable[str], address: object, field: str, step: int | None) -> list[int]:
    """The steps of the run that these objects are. Raises StoreError where they are none, or `step` is not among them."""
    names = list(names)
    if CONFIG not in names:
        raise StoreError(f"{field}={str(address)!r} is not a run folder: it has no {CONFIG}; give the --out of a training run")
    steps = whole_steps(names)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise StoreError(f"{field}={str(address)!r} has no whole checkpoint of step {step}; it has {there}")
    return steps

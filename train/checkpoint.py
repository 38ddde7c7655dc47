"""Checkpoints of a run: asynchronous, checked, and never trusted half-written."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from plait.train.pods.hosts.together import any_of, decide, first, together
from plait.train.run_folder.seal import damage, seal, unreadable
from plait.train.state import TrainState

log = logging.getLogger("plait")
_METRIC = "loss/val"
_PART = 2**28
"""Bytes of an array that are compressed as one: while it is written or read, some of its parts are in memory beside it."""
_PLAIN = re.compile(r"[\w /.,+=@~-]*")
"""Paths that the storage library takes as they are; it has patterns and schemes in which brackets, backslashes and colons say something."""


class CheckpointError(ValueError):
    """No checkpoint that can be used, or one of another model."""


class Kept:
    """Checkpoints of some steps stay."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def should_preserve(self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: Any) -> list[bool]:
        """As the storage library asks for each."""
        return [one.step in self.steps for one in checkpoints]


class Checkpoints:
    """The checkpoints under `folder`, one numbered folder a step.

    Beside the newest `keep_last` the `keep_best` of lowest validation loss and those of `kept.steps` are kept. A checkpoint gets its name
    only when it is whole and holds a manifest of the size and CRC-32 of its files; `restore` checks it and goes back to the last whole one,
    setting a damaged one aside under `damaged-STEP`. Several hosts write one checkpoint, each its parts; host 0 checks and chooses for all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
        at_once: int | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        """Args: `read_only` neither makes nor moves anything; `check` raises before a change where the folder is no longer ours.
        Of `at_once` gigabytes (the largest array's at least; None: of all) copies are in this host's memory together while they are
        written."""
        self.folder = Path(folder).resolve()
        self.read_only = read_only
        self._check = check
        self._arrays = 0
        """In the checkpoint that is being written."""
        self._link: tempfile.TemporaryDirectory[str] | None = None
        self.kept = Kept()
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics[_METRIC], n=keep_best, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best, self.kept]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        # Named here, because a checkpoint's metadata is read before anything is restored.
        arrays = ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once, save_device_host_concurrent_gb=at_once)
        handlers = {"state": arrays, "extra": ocp.JsonCheckpointHandler()}
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        there = self.folder.exists()
        if not read_only:
            with together("checkpoint"):
                if first():
                    self._move_unreadable()
        self._path = self._plain() if there else self.folder
        try:
            self._manager: Any = ocp.CheckpointManager(self._path, options=options, item_handlers=handlers) if there else None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            paths = ", ".join(str(path) for path in self._unreadable()) or self.folder
            raise CheckpointError(
                f"{paths} cannot be used ({type(error).__name__}); remove it, no checkpoint needs it"
            ) from error

    def save(self, step: int, state: TrainState, extra: dict[str, Any], *, loss: float | None) -> None:
        """Starts saving the state after `step` with the JSON `extra`, as it is now; `loss` ranks it among the best.

        Raises:
            OSError: this checkpoint, or the one before, whose writing went on in the background, cannot be written.
        """
        tree = _tree(state)
        parts = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PART), tree)
        then = ocp.args.JsonSave(copy.deepcopy(extra))  # the run goes on while it is written
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree, parts), extra=then)
        ranked = loss is not None and math.isfinite(loss)
        self._check()
        with self._writing():
            self._manager.wait_until_finished()
            self._arrays = len(jax.tree.leaves(tree))
            self._manager.save(step, args=items, metrics={_METRIC: loss} if ranked else None)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps()) if self._manager is not None else []

    def restore(self, like: TrainState, step: int | None = None) -> tuple[int, TrainState, dict[str, Any]] | None:
        """`(step, state, extra)` of the newest whole checkpoint (or that of `step`), None where there is none.

        Args:
            like: the state's shapes, dtypes and shardings. Without an optimizer's, other parts that are None are not read either.
            step: take this one and no other.

        Raises:
            CheckpointError: `step` is not there or damaged, every checkpoint is damaged, or it is of another model.
        """
        steps = decide("checkpoint", self.steps)
        if step is not None and step not in steps:
            raise CheckpointError(
                f"{self.folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}"
            )
        problems = []
        for candidate in [step] if step is not None else reversed(steps):
            problem = decide("checkpoint", functools.partial(damage, self.folder / str(candidate)))
            if problem is None:
                with together("checkpoint"):
                    self._check_model(candidate, like)
                found = None
                try:
                    found = self._read(candidate, like)
                except Exception as error:  # whatever a storage layer raises on bytes that are not what they were
                    problem = f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
                problem = any_of(problem)
                if problem is None and found is not None:
                    return candidate, *found
            problems.append(f"checkpoint {candidate} {problem}")
            log.warning("%s: %s; %s", self.folder, problems[-1], "going back to the one before" if step is None else "not used")
            if not self.read_only and step is None:
                self._set_aside(candidate)
        if problems:
            raise CheckpointError(f"{self.folder} has no whole checkpoint: {'; '.join(problems)}")
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        tree, extra = _tree(like), ocp.args.JsonRestore()
        layout = ocp.checkpoint_utils.construct_restore_args(tree)
        if like.optimizer is not None:
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(tree, layout), extra=extra)
            restored = self._manager.restore(step, args=items)
            return TrainState(**{"ema": None, **restored["state"]}), dict(restored["extra"])
        part = ocp.args.PyTreeRestore(tree, layout, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(self._path / str(step) / "state", args=part)
        rest = self._manager.restore(step, args=ocp.args.Composite(extra=extra))
        return TrainState(**{"params": None, "ema": None, "optimizer": None, **state}), dict(rest["extra"])

    def rewind(self, step: int, every: int | None) -> int | None:
        """The last checkpoint at or before `step` that `every` called for; later ones are set aside under `rewound-STEP`.

        Those that a signal called for do not count, so that a run that was stopped in between goes back as far as one that was not.
        """
        steps = decide("checkpoint", self.steps)
        due = [at for at in steps if at <= step and (every is None or at % every == 0)]
        if not due:
            return None
        for later in (at for at in steps if at > due[-1]):
            self._set_aside(later, "rewound")
        return due[-1]

    def wait(self) -> None:
        """Returns when everything started is on disk. Raises OSError where it cannot be."""
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads. Raises OSError where what was started cannot be written."""
        if self._manager is not None:
            with self._writing():
                self._manager.close()
        if self._link is not None:
            self._link.cleanup()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What a storage layer raises of its own kinds (or a background thread raised before) as an OSError."""
        try:
            yield
        except Exception as error:
            self._check()
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise OSError(
                f"a checkpoint cannot be written to {self.folder}: {what[:400]}; make room or mend the disk, then go on with --resume"
            ) from error

    def _seal(self) -> None:
        """Seals the checkpoint that is about to be renamed to its final name, so that none is ever without a manifest, or not whole."""
        if jax.process_index() != 0:
            return
        self._check()
        for folder in self._path.iterdir():
            if folder.name[:1].isdecimal() and ocp.utils.TMP_DIR_SUFFIX in folder.name:
                seal(folder, self._arrays)

    def _unreadable(self) -> list[Path]:
        """Files with which the storage library might not open the folder."""
        return [path for folder in self.folder.iterdir() if folder.name.isdecimal() for path in unreadable(folder)]

    def _move_unreadable(self) -> None:
        for path in self._unreadable():
            log.warning("%s is not JSON that can be used; it is renamed", path)
            path.rename(path.with_name(f"damaged-{path.name}"))

    def _plain(self) -> Path:
        """The folder by a path without a sign that means something to the storage library: its own, or a link's."""
        if _PLAIN.fullmatch(str(self.folder)):
            return self.folder
        self._link = tempfile.TemporaryDirectory(prefix="plait-")
        path = Path(self._link.name) / "checkpoints"
        path.symlink_to(self.folder, target_is_directory=True)
        return path

    def _check_model(self, step: int, like: TrainState) -> None:
        try:
            saved = self._manager.item_metadata(step)["state"]
            saved = {k: tuple(v.shape) for k, v in saved["params"].items()}
        except Exception:  # unreadable metadata is damage, which restoring reports
            return
        wanted = {name: p.shape for name, p in (like.params or like.ema or {}).items()}
        if saved != wanted:
            name = sorted(set(saved.items()) ^ set(wanted.items()))[0][0]
            raise CheckpointError(
                f"{self.folder}/{step} is of another model: {name} is {saved.get(name)} there and {wanted.get(name)} here; "
                "use the config it was trained with"
            )

    def _set_aside(self, step: int, why: str = "damaged") -> None:
        with together("checkpoint"):
            if first():
                self._check()
                target = self.folder / f"{why}-{step}"
                while target.exists():
                    target = target.with_name(target.name + "-")
                (self.folder / str(step)).rename(target)
        self._manager.reload()


def _tree(state: TrainState) -> dict[str, Any]:
    return {f.name: value for f in dataclasses.fields(state) if (value := getattr(state, f.name)) is not None}

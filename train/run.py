"""A run folder: who may start in it, what goes on, and how it is opened afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from plait.configs import codec
from plait.configs.components import at
from plait.configs.experiment import ExperimentConfig
from plait.configs.files import write_atomically
from plait.configs.mesh import MeshConfig
from plait.configs.vocabulary import check_vocabulary
from plait.data.loader import Data, build_data
from plait.data.progress import heard
from plait.data.remote.address import cache
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import META_FILE, TOKENIZER_FILE, Tokenizer
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.mesh import batch_sharding, make_mesh
from plait.train.pods.hosts import hardware, heartbeat
from plait.train.pods.hosts.layout import batch_layout
from plait.train.pods.hosts.together import agree, broadcast, count, decide, first, together
from plait.train.program import Program
from plait.train.remote.session import held
from plait.train.run_folder.contents import CHECKPOINTS, CONFIG, RunError, begun
from plait.train.run_folder.going_on import A_PLACE, check_goes_on, checkpoint_steps
from plait.train.run_folder.owner import owned
from plait.train.state import Arrays, TrainState

log = logging.getLogger("plait")

_CHANGES_PROGRAMS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
)
_SEEN_SECONDS = 15.0  # file systems over a network show a new file late


def claim(config: ExperimentConfig) -> bool:
    """Whether the run folder holds a run to go on with. Raises RunError when it is used and `resume` is off, holds another run, or has lost
    a part without which nobody can go on."""
    folder = Path(config.folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"out={str(folder)!r} is a file; give a folder")
    if config.wandb is not None and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise RunError(f"wandb={config.wandb!r} needs the package wandb, which is not installed; pip install 'plait[wandb]'")
    if (folder / CONFIG).exists() and not config.resume:
        raise RunError(f"out={str(folder)!r} already holds a run; use --resume to go on with it, or another --out")
    if not begun(folder):
        return False
    saved = codec.load(ExperimentConfig, folder / CONFIG)
    saved = dataclasses.replace(saved, model=at("model", saved.model.kept))  # of a run that kept the names of files
    check_goes_on(saved, config, max(checkpoint_steps(folder), default=0), folder)
    return True


@contextlib.contextmanager
def claimed(config: ExperimentConfig) -> Iterator[tuple[bool, Callable[[], None]]]:
    """The run folder belongs inside to this run, all hosts of which have the same config, code and folder.

    Gives whether it holds a run to go on with (`claim`), and what raises FolderLost where the folder has been lost, for before each write.

    Raises:
        ValueError: on every host, where hosts differ, or where the folder cannot be used or is in use.
    """
    code = {**hardware.versions(), "plait commit": hardware.commit()}
    leaves = {name: value for name, value in codec.leaves(codec.encode(config)).items() if not A_PLACE.fullmatch(name)}
    agree("config", {**leaves, **code, **{name: os.environ.get(name) for name in _CHANGES_PROGRAMS}})
    folder, check = Path(config.folder), _nothing
    with contextlib.ExitStack() as stack:

        def take() -> bool:
            nonlocal check
            there, push = stack.enter_context(held(config.out, resume=config.resume))
            claim(config)  # a folder that cannot be used is left as it is
            here = stack.enter_context(owned(folder))
            check = lambda: (here(), there())[0]
            going_on = claim(config)
            if not going_on:
                for name in (META_FILE, TOKENIZER_FILE):  # of a try that failed before it began: it must not bind this one
                    (folder / "tokenizer" / name).unlink(missing_ok=True)
            push()
            return going_on

        going_on = decide("run folder", take)
        share(folder)
        yield going_on, check


def _nothing() -> None:
    """Hosts other than the first write nothing that the run has once."""


def share(folder: Path) -> None:
    """Raises RunError on every host where some do not see the folder that host 0 sees."""
    if count() == 1:
        return
    token = broadcast(f".meeting-{uuid.uuid4().hex[:12]}")
    with together("run folder"):
        if first():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()
    with together("run folder"):
        deadline = time.monotonic() + _SEEN_SECONDS
        while not (folder / token).exists():
            if time.monotonic() > deadline:
                raise RunError(
                    f"out={str(folder)!r} is not the folder that host 0 sees there; give one on a file system that all hosts share"
                    + (", as PLAIT_CACHE where --out is an address" if folder.is_relative_to(cache()) else "")
                )
            time.sleep(0.5)
    if first():
        (folder / token).unlink()


def write_json(path: Path, value: Any, *, new: bool = False) -> None:
    """Writes `value` as indented JSON, atomically. Raises FileExistsError for a `new` file that is there."""
    write_atomically(path, json.dumps(value, indent=2) + "\n", new=new)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Program):
    """The parts of a run that hold no trained values."""

    data: Data


def set_up(config: ExperimentConfig) -> Setup:
    """Data, mesh and model of an experiment, checked against each other and between the hosts. Raises ValueError before any compile."""
    with together("mesh"):
        check_vocabulary(config)
        mesh = make_mesh(config.mesh)
        layout = batch_layout(config, mesh)
    for reading in (first(), not first()):  # where the hosts share a cache, host 0 fills it and the others find it
        with together("data"):
            if reading:
                with heard(heartbeat.advance):
                    data = build_data(config.data, config.folder, rows=layout.rows)
                check_steps(data, config.steps)
    agree("data", {f"data {name}": value for name, value in data.identity.items()})
    with together("model"):
        config = dataclasses.replace(config, model=config.model.with_vocab(data.vocab_size))
        return Setup.of(config, mesh, data=data)


def check_steps(data: Data, steps: int) -> None:
    """Says what a mixture gives a run of so many steps. Raises RunError where its sources are used up before."""
    if data.schedule is None:
        return
    rows, there = steps * data.config.batch_size, data.schedule.num_rows
    if there is not None and there < rows:
        raise RunError(
            f"steps={steps} of data.batch_size={data.config.batch_size} rows are more than the {there} that data.sources give within "
            f"their max_epochs; use steps={there // data.config.batch_size} or less, or raise a max_epochs"
        )
    for (name, part), own in zip(data.parts.items(), data.schedule.counts(rows), strict=True):
        again = "" if part.num_train_rows is None else f", {own / part.num_train_rows:.3g} epochs"
        log.info("source %s: %.4g%% of the rows%s", name, 100 * own / rows, again)
        if not own:
            log.warning("data.sources.%s gives this run no row; raise its weight", name)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run opened for reading: what it needs is in its folder, its corpus is not looked at."""

    program: Program
    tokenizer: Tokenizer | None
    """None where ids stand for nothing."""
    step: int
    params: Arrays
    """Averaged ones where the run keeps an average."""
    buffers: Arrays
    data: Mapping[str, Any]
    """The identity of what it was trained on."""


def _mesh_for_reading(config: ExperimentConfig) -> MeshConfig:
    """The run's own mesh where these devices can form it, else as many data shards as divide the batch."""
    try:
        batch_sharding(make_mesh(config.mesh), config.data.batch_size, config.data.seq_len, config.optimizer.accumulate)
        return config.mesh
    except ValueError:
        return MeshConfig(data=math.gcd(config.data.batch_size // config.optimizer.accumulate, jax.device_count()))


def opened(folder: str | Path, step: int | None = None, rows_of: ExperimentConfig | None = None) -> Trained:
    """The run in `folder` at its newest whole checkpoint (or that of `step`); nothing is written there, and it may be in training.

    `rows_of` is another experiment, whose rows it is to read, on the mesh of that one.

    Raises:
        RunError: no run, or one without its tokenizer.
        CheckpointError: no such checkpoint that is whole.
    """
    config, tokenizer = described(Path(folder))
    if rows_of is not None:
        optimizer = dataclasses.replace(config.optimizer, accumulate=rows_of.optimizer.accumulate)
        config = dataclasses.replace(config, data=rows_of.data, mesh=rows_of.mesh, optimizer=optimizer)
    config = dataclasses.replace(config, mesh=_mesh_for_reading(config))
    program = Program.of(config, make_mesh(config.mesh))
    at, state, extra = restored(Path(folder), program.like, step)
    data = extra.get("data", {})
    if tokenizer is not None and data.get("tokenizer") not in (None, tokenizer.fingerprint):
        raise RunError(f"{str(folder)!r} has another tokenizer/ than it was trained with; put that one back")
    return Trained(program, tokenizer, at, state.params if state.ema is None else state.ema, state.buffers, data)


def described(folder: Path) -> tuple[ExperimentConfig, Tokenizer | None]:
    """The experiment of the run in `folder`, with the vocabulary settled, and its tokenizer where it has one.

    Raises:
        RunError: no run, or one without its tokenizer.
        CheckpointError: it has no checkpoint.
    """
    if not (folder / CHECKPOINTS).exists() and (folder.suffix == ".gguf" or any(folder.glob("*.safetensors"))):
        raise RunError(
            f"{str(folder)!r} is a published model and no run folder; make one of it first: "
            f"launch.py convert import {folder} runs/{folder.stem}"
        )
    if not (folder / CONFIG).exists():
        raise RunError(f"{str(folder)!r} is not a run folder: it has no {CONFIG}; give the --out of a training run")
    config = dataclasses.replace(codec.load(ExperimentConfig, folder / CONFIG), out=str(folder))
    if not (folder / CHECKPOINTS).exists():
        raise _none_yet(folder)
    tokenizer = None
    if config.data.task.reads_text:
        if not (folder / "tokenizer" / TOKENIZER_FILE).exists():
            raise RunError(f"{str(folder)!r} has no tokenizer/{TOKENIZER_FILE}; put back the one it was trained with")
        tokenizer = load_tokenizer(folder / "tokenizer")
    vocab_size = config.data.vocabulary(None if tokenizer is None else tokenizer.vocab_size)
    if vocab_size is not None:
        config = dataclasses.replace(config, model=config.model.with_vocab(vocab_size))
    return config, tokenizer


def restored(folder: Path, like: TrainState, step: int | None) -> tuple[int, TrainState, dict[str, Any]]:
    """The checkpoint, which training may replace by a newer one while it is read: then that one."""
    seen: list[int] | None = None
    while True:
        checkpoints = Checkpoints(folder / CHECKPOINTS, read_only=True)
        try:
            steps = checkpoints.steps()
            found = checkpoints.restore(like, step)
            if found is not None:
                return found
            raise _none_yet(folder)
        except CheckpointError:
            if step is not None or steps in ([], seen):
                raise
            seen = steps
        finally:
            checkpoints.close()


def _none_yet(folder: Path) -> CheckpointError:
    return CheckpointError(f"{str(folder)!r} has no checkpoint yet; wait for the first one or train longer")

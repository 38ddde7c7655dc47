"""From a published model's folder to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import signal
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs import codec
from plait.configs.experiment import ExperimentConfig
from plait.configs.optimizer import OptimizerConfig, optimizer
from plait.data.config import DataConfig, DataError
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import Tokenizer
from plait.models.config import LMConfig
from plait.train.checkpoint import Checkpoints
from plait.train.convert.arrays import read_arrays
from plait.train.convert.fitting import Source, examined
from plait.train.convert.options import ImportOptions
from plait.train.convert.reading import CONFIG as CONFIG_FILE
from plait.train.convert.weights import ConvertError, Weights
from plait.train.mesh import make_mesh
from plait.train.pods.hosts.together import agree, broadcast, first, together
from plait.train.program import Program
from plait.train.run import share
from plait.train.run_folder.contents import CHECKPOINTS, CONFIG, ORIGINALS, mark
from plait.train.state import Arrays, TrainState

log = logging.getLogger("plait")

FLOAT32 = "float32.json"
"""File beside what is kept for an export: the names of tensors that were float32 among others of half the size, as they are to go out again."""


def import_model(folder: Path, run: Path, options: ImportOptions) -> ExperimentConfig:
    """Makes the run folder `run` of the published model in `folder`, which may be a GGUF file; it appears when it is whole. Several hosts make
    it together, of a model that each of them sees.

    Raises:
        ConvertError: what is there cannot be taken in, or `run` holds something; nothing is written.
    """
    with together("model"):
        require_new(run)
        found = examined(folder)
        found.match.check(folder)
        source, weights = found.source, found.weights
        _check_tied(source, weights)
        tokenizer = _tokenizer(source, options)
        config = _config(source, run, options)
        program = Program.of(config, make_mesh(config.mesh))
    headers = sorted((name, tensor.shape, tensor.dtype) for name, tensor in weights.tensors.items())
    facts = {"tensors": zlib.crc32(repr(headers).encode()), "tokenizer": tokenizer.fingerprint}
    agree("config", {**codec.leaves(codec.encode(config)), **facts})
    (shapes, other), (shardings, others) = program.blueprint.shapes(), program.blueprint.shardings(program.mesh)
    with together("weights"):
        arrays = read_arrays(found.lines, weights.read, {**shapes, **other}, {**shardings, **others})
    if spoilt := [name for name, whole in _finite(arrays).items() if not whole]:
        log.warning("%s: %s has numbers that are not finite, and so will what the model says", folder, ", ".join(spoilt))
    params = {name: array for name, array in arrays.items() if name in program.blueprint.params}
    buffers = jax.jit(lambda: program.blueprint.init()[1], out_shardings=program.shardings.buffers)()
    buffers |= {name: array for name, array in arrays.items() if name in buffers}

    def beside(new: Path) -> None:
        tokenizer.save(new / "tokenizer", tokenizer=str(folder))
        (new / ORIGINALS).mkdir()
        for name, content in source.reader.beside():
            (new / ORIGINALS / name).write_bytes(content)
        widths = {tensor.dtype for tensor in weights.tensors.values()}
        if folder.is_dir() and "F32" in widths and widths & {"BF16", "F16"}:
            wide = sorted(name for name, tensor in weights.tensors.items() if tensor.dtype == "F32")
            (new / ORIGINALS / FLOAT32).write_text(json.dumps(wide, indent=2) + "\n")

    new_run(run, program, params, buffers, {"tokenizer": tokenizer.fingerprint}, beside)
    return config


@jax.jit
def _finite(arrays: Arrays) -> Arrays:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


def require_new(folder: Path) -> None:
    """Raises ConvertError where `folder` is there and holds something, is a link, or would be in a file."""
    if folder.is_symlink():
        raise ConvertError(f"{str(folder)!r} is a link, which would be replaced; give the folder that it names, or another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvertError(f"{str(folder)!r} is there already; give a new folder")
    if file := next((parent for parent in folder.parents if parent.is_file()), None):
        raise ConvertError(f"{str(folder)!r} would be in {str(file)!r}, which is a file; give a folder elsewhere")


def new_run(
    run: Path, program: Program, params: Arrays, buffers: Arrays, data: Mapping[str, Any], beside: Callable[[Path], None]
) -> None:
    """Makes a run folder at step 0 with these arrays; it appears when it is whole.

    Args:
        data: the identity of what the model was trained on.
        beside: writes what else it holds to a path.
    """
    zero = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=program.shardings.step)()
    optimizer_state = jax.jit(program.tx.init, out_shardings=program.shardings.optimizer)(params)
    state = TrainState(zero, params, buffers, optimizer_state, None, zero, zero)
    with appearing(run) as new:
        with together("run folder"):
            if first():
                codec.save(program.config, new / CONFIG)
                beside(new)
                mark(new)
        held = (sum(part.data.nbytes for part in array.addressable_shards) for array in params.values())
        checkpoints = Checkpoints(new / CHECKPOINTS, at_once=math.ceil(max(held) / 1e9))
        try:
            checkpoints.save(0, state, {"data": dict(data)}, loss=None)
        finally:
            checkpoints.close()


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, one for all hosts, that takes its place when all has been written there, and that is removed where something
    fails or ends the process."""
    folder = folder.resolve()
    new = folder.with_name(broadcast(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp"))
    with _unwinding():
        try:
            with together("run folder"):
                if first():
                    new.mkdir(parents=True)
            share(new)
            yield new
            with together("run folder"):
                if first():
                    if folder.exists():
                        folder.rmdir()  # empty, or this fails
                    new.rename(folder)
        finally:
            if first():
                shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does, with its usual exit status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def untrained() -> OptimizerConfig:
    """An optimizer without a state, of a run that only holds a model."""
    return optimizer("sgd", momentum=None, schedule="constant", warmup_steps=0)


def _check_tied(source: Source, weights: Weights) -> None:
    """Raises ConvertError where a head that is said to be the embedding is there and is another."""
    head, embedding = source.family.head, source.family.embedding
    if source.model.tie_embeddings and head in weights and not np.array_equal(weights.read(head), weights.read(embedding)):
        raise ConvertError(
            f"{source.folder} has {head} beside {embedding} with other values, and its {CONFIG_FILE} ties them; "
            "set tie_word_embeddings to false there, or take the tensor out"
        )


def _tokenizer(source: Source, options: ImportOptions) -> Tokenizer:
    """That of the model."""
    path = options.tokenizer or source.folder
    try:
        tokenizer = source.reader.tokenizer() if options.tokenizer is None else load_tokenizer(options.tokenizer)
    except DataError as error:
        raise ConvertError(
            f"{path} has no tokenizer that can be used ({error}); give one with --tokenizer, or save it there with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ) from None
    if source.model.vocab_size is not None and tokenizer.vocab_size > source.model.vocab_size:
        raise ConvertError(
            f"{path} has ids up to {tokenizer.vocab_size - 1} and the model has {source.model.vocab_size}; give its own"
        )
    return tokenizer


def _config(source: Source, run: Path, options: ImportOptions) -> ExperimentConfig:
    """The experiment of an imported model: no step of training, and an optimizer without a state."""
    model: LMConfig = dataclasses.replace(source.model, param_dtype=options.param_dtype, compute_dtype=options.compute_dtype)
    positions = model.positions
    limit = source.fields.get("max_position_embeddings") if positions is None else positions.longest
    most = limit if isinstance(limit, int) else 2048
    if options.seq_len is None and most < 1:
        raise ConvertError(
            f"{source.folder}: {CONFIG_FILE}: max_position_embeddings={most} must be at least 1; restore the file, or give --seq-len"
        )
    tokenizer = options.tokenizer or (source.folder if source.folder.is_dir() else run)
    return ExperimentConfig(
        name="imported",
        steps=1,
        model=model,
        data=DataConfig(tokenizer=str(tokenizer.resolve()), seq_len=options.seq_len or min(2048, most)),
        optimizer=untrained(),
        mesh=options.mesh,
        out=str(run),
    )

"""What a run begins with when that is another run: its weights, its model, its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs import codec
from plait.configs.command_line.cli import parse_experiment
from plait.configs.command_line.exchange import take
from plait.configs.experiment import ExperimentConfig
from plait.configs.files import read_json
from plait.configs.optimizer import optimizer
from plait.data.config import DataConfig
from plait.data.remote.address import Address
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from plait.models.config import OF_TRAINING, LMConfig
from plait.models.layers.linear import start_singular_vectors
from plait.models.lm import LM, fold
from plait.train.pods.hosts.together import decide, first, together
from plait.train.program import Program
from plait.train.remote.reading import run_here
from plait.train.remote.session import config_of
from plait.train.run import described, restored, write_json
from plait.train.run_folder.branch import Fork
from plait.train.run_folder.contents import CHECKPOINTS, CONFIG, ORIGIN, ORIGINALS, RunError
from plait.train.run_folder.going_on import checkpoint_steps
from plait.train.state import Arrays, Blueprint, TrainState, begin_with

log = logging.getLogger("plait")

_MOST = 6
"""Differences that an error lists."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A run whose weights another begins with."""

    text: str
    """As it was named."""
    folder: Path
    step: int | None
    """Of the checkpoint; None for the newest."""
    config: ExperimentConfig
    """With the vocabulary settled."""
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, text: str) -> Self:
        """The run RUN, or that of RUN/checkpoints/STEP. Raises ValueError where there is none."""
        path, step = run_here(text, "init_from").expanduser(), None
        if path.parent.name == CHECKPOINTS and path.name.isdecimal():
            path, step = path.parent.parent, int(path.name)
        if not (path / CHECKPOINTS).is_dir() or not (path / CONFIG).is_file():
            raise RunError(
                f"init_from={text!r} must be a run folder with {CONFIG} and {CHECKPOINTS}/, or RUN/{CHECKPOINTS}/STEP; give the --out of "
                "a run, or make one of a published model with launch.py convert import DIR RUN"
            )
        if step is not None and not (path / CHECKPOINTS / str(step)).is_dir():
            there = ", ".join(map(str, checkpoint_steps(path)))
            raise RunError(f"init_from={text!r} has no checkpoint of step {step}; use one of {there or 'another run'}")
        return cls(text, path, step, *described(path))

    @property
    def named(self) -> str:
        """Where the run is: its address, or its path on this machine."""
        address = Address.of(self.text)
        if address is None:
            return str(self.folder)
        return str(address.parent.parent if self.step is not None else address)

    def check(self, config: ExperimentConfig) -> None:
        """Raises RunError where the model of `config` is another, or reads other tokens."""
        changed = _differences(self.config.model, config.model)
        if changed:
            more = f" and {len(changed) - _MOST} more" if len(changed) > _MOST else ""
            raise RunError(
                f"init_from={self.text!r} holds another model: {'; '.join(changed[:_MOST])}{more}; set the fields as they are there, or "
                "leave the preset out to take its model"
            )
        lengths = [one.data.seq_len for one in (self.config, config)]
        if lengths[0] != lengths[1] and _knows_its_length(self.config.model, lengths):
            raise RunError(
                f"data.seq_len={lengths[1]} makes another function of the weights of init_from={self.text!r}, some of whose layers know the "
                f"length of rows in training; use --data.seq-len {lengths[0]}"
            )
        if not config.data.task.reads_text:
            return
        fix = f"use --data.tokenizer {self.folder} --data.vocab-size None"
        given = config.data.tokenizer
        if self.tokenizer is None:
            raise RunError(
                f"data.task={config.data.task.name} reads text, and init_from={self.text!r} was trained on "
                f"data.task={self.config.data.task.name}, without a tokenizer; use another run"
            )
        if given == "bpe":
            raise RunError(
                f"data.tokenizer='bpe' learns a vocabulary, and the weights of init_from={self.text!r} are for that of their run; {fix}"
            )
        tokenizer = ByteTokenizer() if given == "byte" else load_tokenizer(given)
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise RunError(f"data.tokenizer={given!r} is another one than that of init_from={self.text!r}; {fix}")


def parse_run(words: Sequence[str]) -> ExperimentConfig:
    """The experiment of `PRESET ...`; of `--init-from RUN ...`, whose model and data are then those of the run; or of
    `--branch CHECKPOINT ...`, which is all that its run was, and whose folder is made here where there is none to go on with.

    Raises:
        ValueError: bad words or values.
    """
    if (text := take("branch", words := list(words))) is not None:
        return _branched(text, words)
    if words and not words[0].startswith("-"):
        return parse_experiment(words[0], words[1:])
    text = take("init_from", list(words))
    if text is None:
        raise ValueError(
            "train needs a preset first, as in 'launch.py train lm_quick', or --init-from RUN, or --branch RUN/checkpoints/STEP"
        )
    out = take("out", list(words))
    own = None if out is None or "--resume" not in words else config_of(out)
    if own is not None and own.exists():
        return parse_experiment(codec.load(ExperimentConfig, own), words)
    return parse_experiment(tuning(Origin.of(text)), words)


def _branched(text: str, words: Sequence[str]) -> ExperimentConfig:
    if words and not words[0].startswith("-"):
        raise RunError(f"branch={text!r} says which experiment it is; leave {words[0]!r} out")
    out = take("out", list(words))
    if out is None:
        raise RunError(f"branch={text!r} needs a folder of its own; give --out")
    own = config_of(out)
    if "--resume" in words and decide("run folder", own.exists):
        return parse_experiment(codec.load(ExperimentConfig, own), words)
    fork = Fork.of(text)
    config = dataclasses.replace(parse_experiment(fork.config, words), resume=True)
    if first():
        fork.make(config)
    return config


def tuning(origin: Origin) -> ExperimentConfig:
    """The experiment of a run from `origin` alone: its model and data, and a low rate without warm-up or decay of weights."""
    data: DataConfig = origin.config.data
    if data.task.reads_text:
        data = dataclasses.replace(data, tokenizer=origin.named, vocab_size=None)
    return ExperimentConfig(
        name=f"{origin.folder.resolve().name[:90]}_tuned",
        steps=1000,
        model=origin.config.model,
        data=data,
        optimizer=optimizer("adamw", learning_rate=2e-5, warmup_steps=0, weight_decay=0.0),
        init_from=origin.text,
    )


def settled(config: ExperimentConfig) -> ExperimentConfig:
    """`config` with the vocabulary of the run that it begins with, once that was found to be of the same model and tokenizer.

    A run that goes on has been through that, and needs its origin no more.

    Raises:
        ValueError: on every host, where the origin is no run, or of another model or tokenizer.
    """
    if config.init_from is None:
        return config
    with together("init_from"):
        own = config_of(config.out or config.folder) if config.resume else Path(config.folder) / CONFIG
        if config.resume and own.exists():
            model = codec.load(ExperimentConfig, own).model
        else:
            origin = Origin.of(config.init_from)
            origin.check(config)
            model = origin.config.model
        size = config.model.vocab_size or model.vocab_size
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def begin(setup: Program, text: str) -> TrainState:
    """The state at step 0 of a run that begins with the weights of `text`: the averaged ones where that run keeps an average.

    They are read into this run's layout and dtype. What they are from is written to the run folder, and read there by a run that was killed
    before its first checkpoint.
    """
    folder = Path(setup.config.folder)
    with together("init_from"):
        origin = Origin.of(text)
        origin.check(setup.config)
    recorded = decide("run folder", lambda: read_json(folder / ORIGIN) if (folder / ORIGIN).exists() else None)
    step = origin.step if recorded is None else int(recorded["step"])
    there, here = origin.config.model, setup.config.model
    folded = _is_folded(there, here)
    dtype = there.param_dtype if folded else here.param_dtype
    before = Blueprint(
        dataclasses.replace(setup.config, model=dataclasses.replace(there, param_dtype=dtype, compute_dtype=here.compute_dtype))
    )
    step, state, extra = restored(origin.folder, _like(before, setup, averaged=origin.config.optimizer.ema is not None), step)
    known = extra.get("data", {}).get("tokenizer")
    if origin.tokenizer is not None and known not in (None, origin.tokenizer.fingerprint):
        raise RunError(f"init_from={text!r} has another tokenizer/ than it was trained with; put that one back")
    with together("run folder"):
        if first():
            run = str(origin.folder.resolve()) if Address.of(text) is None else origin.named
            facts = {"run": run, "step": step, "tokenizer": known}
            write_json(folder / ORIGIN, facts)
            if (origin.folder / ORIGINALS).is_dir():
                shutil.copytree(origin.folder / ORIGINALS, folder / ORIGINALS, dirs_exist_ok=True)
    log.info("%s begins with the weights of %s at step %d", folder, origin.folder, step)
    params = state.params if state.ema is None else state.ema

    def made(params: Arrays, buffers: Arrays) -> TrainState:
        return begin_with(setup.blueprint, setup.tx, *_rewritten(before, setup.blueprint, params, buffers, folded))

    return jax.jit(made, out_shardings=setup.shardings, donate_argnums=(0, 1))(params, state.buffers)


def _is_folded(there: LMConfig, here: LMConfig) -> bool:
    """Whether a model has adapters or gains that the new one has not in the same form."""
    adapters = there.lora.rank is not None and there.lora != here.lora
    return adapters or (there.sigma_reparam is not None and here.sigma_reparam is None)


def _rewritten(before: Blueprint, blueprint: Blueprint, params: Arrays, buffers: Arrays, folded: bool) -> tuple[Arrays, Arrays]:
    """The `(params, buffers)` of the same function in the form of `blueprint`; new adapters are drawn, and change nothing."""
    old = {**params, **buffers}
    if folded:
        model = fold(before.build(params, buffers))
        parts = Blueprint(dataclasses.replace(before.config, model=model.config)).split(model)
        old = {**parts[0], **parts[1]}
    shapes = blueprint.shapes()
    wanted = {**shapes[0], **shapes[1]}
    new: Mapping[str, Any] = {}
    if wanted.keys() - old.keys():
        drawn = blueprint.init()
        new = {**drawn[0], **drawn[1]}
    every = {name: (old[name].astype(like.dtype) if name in old else new[name]) for name, like in wanted.items()}
    found = tuple({name: every[name] for name in part} for part in shapes)
    sigma = blueprint.config.model.sigma_reparam
    if sigma is None or (before.config.model.sigma_reparam is not None and not folded):
        return found[0], found[1]
    model = blueprint.build(*found)
    start_singular_vectors(model, "spectral")
    return blueprint.split(model)


def _like(blueprint: Blueprint, setup: Program, *, averaged: bool) -> TrainState:
    """The weights alone, as they lie on the mesh of the new run."""
    place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    params, buffers = jax.tree.map(place, blueprint.shapes(), blueprint.shardings(setup.mesh))
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=setup.shardings.step)
    nothing: Any = None
    own, average = (nothing, params) if averaged else (params, nothing)
    return TrainState(zero, own, buffers, nothing, average, zero, zero)


def _differences(there: LMConfig, here: LMConfig) -> list[str]:
    """In what `here` is another function than `there`, as `model.d_model: 64 -> 32`."""
    if here.vocab_size is None:
        here = dataclasses.replace(here, vocab_size=there.vocab_size)
    if here.layers == there.layers:
        here = dataclasses.replace(here, pattern=there.pattern)
    before, after = ({k: v for k, v in _settled(model).items() if k not in OF_TRAINING} for model in (there, here))
    return codec.differences(before, after, "model")


def _knows_its_length(model: LMConfig, lengths: Sequence[int]) -> bool:
    """Whether layers are made otherwise for rows of other lengths, as those of sigmoid attention."""
    stacks = [
        nnx.eval_shape(lambda size=size: LM(model, rngs=nnx.Rngs(0), seq_len=size).stack) for size in (lengths[0], *lengths)
    ]
    again, one, other = (nnx.split(stack)[0] for stack in stacks)
    return again == one != other  # a layer that holds a function of its own is like no other, not even itself


def _settled(model: LMConfig) -> dict[str, Any]:
    """A model's config with what follows from its width written out, and what training alone knows of mixers left out."""
    mixers = {name: mixer.from_weights(model.d_model) for name, mixer in model.mixers.items()}
    settled = lambda one: None if one is None else one.settled(model.d_model)
    channel_mixers = {name: settled(one) for name, one in model.channel_mixers.items()}
    return codec.encode(
        dataclasses.replace(model, mixers=mixers, channel_mixers=channel_mixers, channel_mixer=settled(model.channel_mixer))
    )

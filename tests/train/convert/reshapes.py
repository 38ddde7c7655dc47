"""Small run folders to be reshaped, whose parameters are all off their initial values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.data.config import DataConfig
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.kernels import Tokens
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.hf.places import layer_places
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.tests.models.common import quick_jit
from plait.train.convert.importing import new_run, untrained
from plait.train.convert.reshapes.base import Reshape
from plait.train.convert.reshaping import Reshaped, reshape_run
from plait.train.mesh import make_mesh
from plait.train.program import Program
from plait.train.run import Trained, opened

LENGTH = 16
ONE_DEVICE = MeshConfig(data=1)


def model_of(**changes: Any) -> LMConfig:
    """Three layers of softmax attention, six heads of four channels at width 20; options of the mixer or of the model."""
    own = {field.name for field in dataclasses.fields(LMConfig)} - {field.name for field in dataclasses.fields(SoftmaxConfig)}
    mixer = SoftmaxConfig(**({"num_heads": 6, "head_dim": 4} | {key: value for key, value in changes.items() if key not in own}))
    base = {
        "d_model": 20,
        "num_layers": 3,
        "pattern": "softmax",
        "mixers": {"softmax": mixer},
        "channel_mixer": GatedMLPConfig(hidden_dim=24),
        "vocab_size": 260,
    }
    return LMConfig(**{**base, **{key: value for key, value in changes.items() if key in own}})


def make_run(folder: Path, model: LMConfig, edit: Any = None, mesh: MeshConfig = ONE_DEVICE, *, length: int = LENGTH) -> Path:
    """A run folder on bytes at step 0; `edit(params)` changes its arrays, which are NumPy's, by dotted path."""
    config = ExperimentConfig(
        name="small",
        steps=1,
        model=model,
        data=DataConfig(tokenizer="byte", seq_len=length, batch_size=8),
        optimizer=untrained(),
        mesh=mesh,
        out=str(folder),
    )
    program = Program.of(config, make_mesh(config.mesh))
    shapes, _ = program.blueprint.shapes()
    rng = np.random.default_rng(0)
    params = {path: _drawn(rng, path, like.shape) for path, like in shapes.items()}
    if edit is not None:
        edit(params)
    placed = {
        path: jax.device_put(params[path].astype(like.dtype), program.shardings.params[path]) for path, like in shapes.items()
    }
    buffers = jax.jit(lambda: program.blueprint.init()[1], out_shardings=program.shardings.buffers)()
    tokenizer = ByteTokenizer()
    beside = lambda new: tokenizer.save(new / "tokenizer", tokenizer="byte")
    new_run(folder, program, placed, buffers, {"tokenizer": tokenizer.fingerprint}, beside)
    return folder


def _drawn(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("kernel"):
        return rng.normal(0, 1.5 * shape[-2] ** -0.5, shape)
    return rng.normal(1 if path.endswith(("scale", "gain")) else 0, 0.3, shape)


def reshaped(run: Path, reshape: Reshape, name: str = "new", **options: Any) -> tuple[Reshaped, Trained]:
    """What a reshape changed, and the new run."""
    found = reshape_run(run, run.with_name(name), reshape, **options)
    return found, opened(run.with_name(name))


def logits(trained: Trained, ids: np.ndarray | None = None) -> np.ndarray:
    """Of two rows of some ids."""
    ids = np.random.default_rng(1).integers(0, 257, (2, LENGTH)) if ids is None else ids
    run = lambda params, buffers, ids: trained.program.blueprint.build(params, buffers)(Tokens(ids))[0]
    return np.asarray(quick_jit(run)(trained.params, trained.buffers, jnp.asarray(ids, jnp.int32)))


def layer(trained: Trained, index: int) -> dict[str, np.ndarray]:
    """The parameters of a layer by their paths in it, float64."""
    place = layer_places(trained.program.config.model)[index]
    learned = {path: a for path, a in {**trained.params, **trained.buffers}.items() if path in trained.program.blueprint.learned}
    inside = {path.removeprefix(f"{place.path}."): a for path, a in learned.items() if path.startswith(f"{place.path}.")}
    return {path: np.asarray(a[place.index], np.float64) for path, a in inside.items()}

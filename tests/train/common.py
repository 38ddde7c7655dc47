"""What the trainer's tests share: tiny experiments, batches, corpora, and the trainer's parts without data."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.configs.optimizer import optimizer
from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.models.channel_mixers.gated_mlp import GatedMLPConfig
from plait.models.config import LMConfig
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.gated_deltanet import GatedDeltaNetConfig
from plait.models.mixers.moh import MoHConfig
from plait.train.mesh import make_mesh
from plait.train.program import Program

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "law",
    "of",
    "people",
    "and",
    "war",
    "is",
    "a",
    "river",
    "that",
    "runs",
    "between",
    "two",
    "countries",
    "über",
    "naïve",
    "日本",
    "1790",
    ",",
    ".",
    ";",
    "\n",
]


def tiny(changes: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Two softmax layers on bytes, one device: the cheapest model to compile. `changes` are values by dotted path."""
    config = ExperimentConfig(
        name="tiny",
        steps=6,
        model=LMConfig(
            d_model=16,
            num_layers=2,
            pattern="softmax",
            mixers={"softmax": SoftmaxConfig(num_heads=2, head_dim=8)},
            channel_mixer=GatedMLPConfig(hidden_dim=24),
        ),
        data=DataConfig(tokenizer="byte", seq_len=16, batch_size=4, val_fraction=0.1),
        optimizer=optimizer("adamw", learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=1),
        probe_every=None,
        eval_every=None,
        checkpoint_every=None,
        log_every=1,
    )
    return changed(config, changes or {})


def hybrid(changes: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """`tiny` with a gated DeltaNet and a Mixture-of-Head softmax layer."""
    mixers = {
        "gated_deltanet": GatedDeltaNetConfig(num_heads=2, head_dim=4),
        "moh+softmax": MoHConfig(mixer=SoftmaxConfig(num_heads=4, head_dim=4)),
    }
    model = dataclasses.replace(tiny().model, pattern="gated_deltanet,moh+softmax", mixers=mixers)
    return changed(dataclasses.replace(tiny(), model=model), changes or {})


def mixture(changes: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """`tiny` with a plain and a Mixture-of-Head softmax layer."""
    mixers = {name: hybrid().model.mixers.get(name) or tiny().model.mixers[name] for name in ("softmax", "moh+softmax")}
    model = dataclasses.replace(tiny().model, pattern="softmax,moh+softmax", mixers=mixers)
    return changed(dataclasses.replace(tiny(), model=model), changes or {})


def routed(changes: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """`tiny` with one Mixture-of-Head softmax layer."""
    mixers = {"moh+softmax": hybrid().model.mixers["moh+softmax"]}
    model = dataclasses.replace(tiny().model, pattern="moh+softmax", num_layers=1, mixers=mixers)
    return changed(dataclasses.replace(tiny(), model=model), changes or {})


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with the values at dotted paths replaced, all paths of one parent at once (so that joint rules hold)."""
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    get = config.__getitem__ if isinstance(config, Mapping) else lambda name: getattr(config, name)
    here |= {name: changed(get(name), inner) for name, inner in below.items()}
    return {**config, **here} if isinstance(config, Mapping) else dataclasses.replace(config, **here)


def get_leaf(config: Any, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def program_of(config: ExperimentConfig, vocab: int = 64, devices: int = 1) -> Program:
    """The step for a vocabulary of `vocab` on the first `devices` devices."""
    config = dataclasses.replace(config, model=config.model.with_vocab(vocab))
    return Program.of(config, make_mesh(config.mesh, jax.devices()[:devices]))


def random_batch(batch_size: int = 4, seq_len: int = 16, vocab: int = 64, seed: int = 0) -> Batch:
    """Rows of two documents each, the last one ending in padding."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, seq_len)
    borders = rng.integers(1, seq_len, batch_size)[:, None]
    column = np.arange(seq_len)[None]
    segment_ids = np.where(column < borders, 1, 2).astype(np.int32)
    positions = np.where(column < borders, column, column - borders).astype(np.int32)
    segment_ids[-1, -3:] = positions[-1, -3:] = 0
    tokens, targets = rng.integers(0, vocab, shape, np.int32), rng.integers(0, vocab, shape, np.int32)
    return Batch(tokens, targets, segment_ids, positions, (segment_ids > 0).astype(np.float32))


def write_corpus(folder: Path, *, files: int = 4, words: int = 300, seed: int = 0) -> Path:
    """A folder of .txt documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index in range(files):
        text = " ".join(rng.choices(WORDS, k=words + 40 * index)) + f" {index}"
        (folder / f"{index}.txt").write_text(text, "utf-8")
    return folder


def launch(*args: object, cache: Path, program: Sequence[str] = (str(ROOT / "launch.py"),), **popen: Any) -> subprocess.Popen:
    """`launch.py`, or another program, with these arguments as a process, compiling through the cache."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment(cache)},
        **popen,
    )


def environment(cache: Path) -> dict[str, str]:
    """Environment of a process that compiles as this one does (the other settings it inherits) and keeps it in `cache`."""
    return {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def tree_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree by path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def different_arrays(left: Any, right: Any) -> list[str]:
    """Paths at which two pytrees are not bit for bit the same."""
    a, b = tree_arrays(left), tree_arrays(right)
    return sorted(p for p in a.keys() | b.keys() if p not in a or p not in b or a[p].tobytes() != b[p].tobytes())

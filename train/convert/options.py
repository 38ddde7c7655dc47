"""Options of conversions that their commands share with what they run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from plait.configs.components import Config
from plait.configs.domains import LearningRate, Length, Rows, SomeCoefficient, SomeSpan, Steps
from plait.configs.mesh import MeshConfig
from plait.models.config import Dtype

By = Literal["recall", "far", "entropy", "gates"]
"""How the need of a layer for full attention is measured: see `plait.train.convert.linearize.ranking`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatesConfig(Config):
    """How gates are trained that tell which heads need all tokens. Source: DuoAttention (arXiv 2410.10819); its windows are 128 + 256
    tokens in rows of up to 32,000, its steps 2,000."""

    steps: Steps = 300
    """Steps."""
    rows: Rows = 2
    """Rows of a step."""
    num_sink_tokens: SomeSpan = 4
    """First tokens of a document that stay visible beside the window."""
    penalty: SomeCoefficient = 0.05
    """What the mean gate costs beside the distance that closing gates makes."""
    learning_rate: LearningRate = 0.02
    """Peak rate of Adam."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Of the run folder that it becomes."""

    param_dtype: Dtype = "float32"
    """In which parameters are kept: float32 to train on, bfloat16 for half the memory."""
    compute_dtype: Dtype = "float32"
    """In which the model computes."""
    seq_len: Length | None = None
    """Tokens of a row where the run is scored; by default 2048, or the model's own limit where that is less."""
    tokenizer: Path | None = None
    """A tokenizer.json, or its folder, where the model's folder has none."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Over which the arrays are laid."""

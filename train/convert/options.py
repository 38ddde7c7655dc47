"""Options of conversions that their commands share with what they run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from plait.configs.domains import Length
from plait.configs.mesh import MeshConfig
from plait.models.config import Dtype

By = Literal["recall", "far", "entropy"]
"""How the need of a layer for full attention is measured: see `plait.train.convert.ranking.NEEDS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Of the run folder that it becomes."""

    param_dtype: Dtype = "float32"
    """In which parameters are kept: float32 to train on, bfloat16 for half the memory."""
    compute_dtype: Dtype = "float32"
    """In which the model computes."""
    seq_len: Length | None = None
    """Tokens of a row where the run is scored; by default 2,048, or the model's own limit where that is less."""
    tokenizer: Path | None = None
    """A tokenizer.json, or its folder, where the model's folder has none."""
    mesh: MeshConfig = MeshConfig(data=1)
    """Over which the arrays are laid."""

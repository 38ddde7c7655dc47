"""How devices are laid out."""

from __future__ import annotations

import dataclasses
from typing import Literal

from plait.configs.components import Config
from plait.configs.domains import Devices

MESH_AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, the outermost first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """How many devices each mesh axis has, from the outermost (across TPU slices) in; their product is the number of devices used."""

    path = "mesh"

    pipeline: Devices = 1
    """Stages in which the repetitions of the layer pattern lie, one behind the other; `optimizer.accumulate` micro-batches fill them."""
    data: Devices | None = None
    """Data parallel; None takes the devices that the other axes leave."""
    fsdp: Devices = 1
    """Data parallel with parameters and optimizer state sharded."""
    expert: Devices = 1
    """Experts of a mixture sharded; to all else, data parallel."""
    context: Devices = 1
    """Tokens of a sequence sharded: each device holds a contiguous part of every row."""
    context_exchange: Literal["gather", "ring", "all_to_all"] = "gather"
    """How parts of rows meet over `context`: each device gathers all keys, and states; or they go round a ring; or softmax attention gets whole
    sequences of some heads, where they can be dealt out (Ulysses), and states are gathered."""
    tensor: Devices = 1
    """Heads, channel-mixer widths and the vocabulary sharded."""
    zero: bool = False
    """ZeRO: moments and average sharded also over data, expert, context and pipeline, gradients reduced to those parts."""
    offload: Literal["optimizer"] | None = None
    """What waits in the host's memory between updates: the optimizer's moments; None for nothing."""

    def check(self) -> None:
        if self.context_exchange != "gather" and self.context == 1:
            raise ValueError(
                f"context_exchange={self.context_exchange} is of sequences cut over devices, and context=1 cuts none; "
                "use gather, or context=2 or more"
            )

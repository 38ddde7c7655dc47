"""What Moneta, Yaad and Memora share: memories of two layers with a residual, and gates of each channel by a low rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from plait.configs.domains import Channels
from plait.models.build import BuildContext
from plait.models.mixers.linear.neural_memory import Gate, MemoryConfig, MemoryHeads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirasConfig(MemoryConfig):
    """Options of the three; `M(x) = x + norm(W_1 gelu(W_2 x))`, the norm without parameters."""

    gate_rank: Channels = 32
    """Inner width of the projections to the retention and the step of each channel."""

    @classmethod
    def example(cls):
        return cls(num_heads=2, head_dim=8, expand=2.0, gate_rank=4, chunk_size=8)

    @property
    def layers(self) -> int:
        return 2

    def build(self, d_model: int, ctx: BuildContext) -> Miras:
        return Miras(self, d_model, ctx)


class Miras(MemoryHeads):
    """See the config of each."""

    def __init__(self, config: MirasConfig, d_model: int, ctx: BuildContext, init: Callable[..., Any] | None = None):
        self.config = config
        self.memories(config, d_model, ctx, init=init)
        shape, rank = (self.num_heads, config.head_dim), config.gate_rank
        self.retention = Gate(ctx, d_model, shape, start=4.0, rank=rank)
        self.learning = Gate(ctx, d_model, shape, start=-6.0, rank=rank)
        self.gated_output(ctx, d_model, config)

    def gates(self, x):
        return {"g": jax.nn.log_sigmoid(self.retention(x)), "step": jax.nn.sigmoid(self.learning(x))}

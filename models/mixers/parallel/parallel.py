"""Mixers side by side on one input, each normalised, weighed and averaged."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import at as under
from plait.configs.domains import Epsilon
from plait.models.build import BuildContext
from plait.models.look import Look
from plait.models.mixers.base import HeadKind, Mixed, Mixer, MixerConfig, register
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.norms import RMSNorm
from plait.models.stream import CarryUse

_MOST_PARTS = 16


@register(
    "parallel",
    kind="parallel",
    source="Hymba (2411.13676); Falcon-H1 (2507.22448)",
    proof="its parts",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig):
    """`y = sum_i beta_i norm_i(part_i(x)) / n`, the scale beta_i of each channel learned and starting at 1.

    Hymba normalises before one output projection that its parts share; here each part keeps its own, so that any mixers fit together.
    """

    parts: tuple[MixerConfig, ...] = (SoftmaxConfig(), Mamba2Config())
    """The mixers, of any kind."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norm of each part's output."""

    def check(self) -> None:
        if not 2 <= len(self.parts) <= _MOST_PARTS:
            raise ValueError(f"parts has {len(self.parts)} mixers; it must have at least 2 and at most {_MOST_PARTS}; use 2")

    @classmethod
    def example(cls) -> ParallelConfig:
        return cls(parts=(SoftmaxConfig.example(), Mamba2Config.example()))

    @property
    def directions(self):  # type: ignore[override]
        """Those that all parts have."""
        return tuple(one for one in self.parts[0].directions if all(one in part.directions for part in self.parts))

    def fit(self, d_model: int) -> None:
        for index, part in enumerate(self.parts):
            under(f"parts.{index}", part.fit, d_model)

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        return tuple(use for part in self.parts for use in part.carries(d_model))

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        return tuple(kind for part in self.parts for kind in part.head_kinds(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> Parallel:
        return Parallel(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return sum(part.mixing_flops(d_model, seq_len) for part in self.parts)


class Parallel(Mixer):
    """See `ParallelConfig`. The heads are those of the parts, one part after another; so are states and what is shown."""

    def __init__(self, config: ParallelConfig, d_model: int, ctx: BuildContext):
        self.parts = nnx.List([part.build(d_model, ctx) for part in config.parts])
        self.norms = nnx.List([RMSNorm(ctx, d_model, eps=config.norm_eps) for _ in config.parts])
        self.num_heads = sum(part.num_heads for part in self.parts)

    def _join(self, outputs: list[jax.Array]) -> jax.Array:
        normed = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        return functools.reduce(jnp.add, normed) / len(outputs)

    def __call__(self, x, *, at, carry, observer=None):
        outputs: list[jax.Array] = []
        losses: dict[str, jax.Array] = {}
        looks: tuple[Look, ...] = ()
        for part in self.parts:
            mixed = part(x, at=at, carry=carry, observer=observer)
            outputs.append(mixed.y)
            carry, looks = mixed.carry, looks + mixed.looks
            losses |= {name: losses.get(name, 0) + value for name, value in mixed.losses.items()}
        return Mixed(self._join(outputs), carry, losses, looks)

    def init_state(self, batch_size, max_len):
        return [part.init_state(batch_size, max_len) for part in self.parts]

    def prefill(self, x, state, *, at, carry):
        return self._each("prefill", x, state, at, carry)

    def step(self, x, state, *, at, carry):
        return self._each("step", x, state, at, carry)

    def _each(self, method, x, state, at, carry):
        outputs, after = [], []
        for part, old in zip(self.parts, state, strict=True):
            y, carry, new = getattr(part, method)(x, old, at=at, carry=carry)
            outputs.append(y)
            after.append(new)
        return self._join(outputs), carry, after

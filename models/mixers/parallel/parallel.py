"""Mixers side by side on one input: their outputs, or their heads, are joined."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import at as under
from plait.configs.domains import Epsilon, Positive
from plait.models.axes import EMBED, HEADS
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.looks.look import Look
from plait.models.looks.taps import behind
from plait.models.mixers.around import AroundHeads
from plait.models.mixers.base import HeadKind, HeadMixer, Mixed, Mixer, MixerConfig, abstract, register
from plait.models.mixers.full.softmax import SoftmaxConfig
from plait.models.mixers.heads import join_heads, split_heads
from plait.models.mixers.linear.mamba2 import Mamba2Config
from plait.models.stream import CarryUse

_MOST_PARTS = 16


@register(
    "parallel",
    kind="parallel",
    source="Hymba (2411.13676); Falcon-H1 (2507.22448); HydraHead (2606.20097)",
    proof="transformers: Falcon-H1; Hymba by hand; split heads as one layer",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(MixerConfig):
    """`y = sum_i c_i W_i norm_i(heads_i(a_i x))`, or the mean; each mixer i brings its heads and its output projection W_i.

    A sum of parts is the projection of their heads side by side, for W (h_1, h_2) = W_1 h_1 + W_2 h_2. The field's layers are options:

    - Hymba: `join="mean"`, `norm="heads"`, `shared_output=True`: one W, the scales of the norms its learned beta. Its meta tokens are a
      prefix of the whole model, not of a mixer, and are not part of this one.
    - Falcon-H1: `join="sum"`, `norm=None`, with its multipliers of the inputs (a) and the outputs (c).
    - Split heads, some of one kind and the rest of another: `join="sum"`, each part with its share of `num_heads`; HydraHead brings
      their heads to one scale before they are projected, `norm="heads"`. Which heads stay softmax is its conversion's choice.
    - Based's window and linear attention in one layer: `join="sum"`, `norm=None`, softmax with a `window_size` beside a linear mixer.

    The default normalises the outputs themselves, so that any mixers fit together.
    """

    parts: tuple[MixerConfig, ...] = (SoftmaxConfig(), Mamba2Config())
    """The mixers, of any kind."""
    join: Literal["mean", "sum"] = "mean"
    """What is made of the parts' outputs."""
    norm: Literal["outputs", "heads"] | None = "outputs"
    """What of each part an RMS norm with a learned scale of each channel brings to one size: its output, or its heads side by side before
    they are projected; None for neither."""
    shared_output: bool = False
    """One output projection for all parts, whose heads must be equally wide together."""
    in_multipliers: tuple[Positive, ...] | None = None
    """Multiplies what each part reads; None for 1."""
    out_multipliers: tuple[Positive, ...] | None = None
    """Multiplies what each part gives; None for 1."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norms."""

    def check(self) -> None:
        if not 2 <= len(self.parts) <= _MOST_PARTS:
            raise ValueError(f"parts has {len(self.parts)} mixers; it must have at least 2 and at most {_MOST_PARTS}; use 2")
        for name in ("in_multipliers", "out_multipliers"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.parts):
                raise ValueError(f"{name} has {len(given)} numbers for {len(self.parts)} parts; give one a part, or None")
        if self.shared_output and self.norm == "outputs":
            raise ValueError(
                "shared_output=True leaves one output for all parts, and norm='outputs' normalises each; use norm='heads'"
            )

    @classmethod
    def example(cls) -> ParallelConfig:
        return cls(parts=(SoftmaxConfig.example(), Mamba2Config.example()))

    @property
    def directions(self):  # type: ignore[override]
        """Those that all parts have."""
        return tuple(one for one in self.parts[0].directions if all(one in part.directions for part in self.parts))

    @property
    def longest(self) -> int | None:
        return min((part.longest for part in self.parts if part.longest is not None), default=None)

    @property
    def unclipped(self) -> str | None:
        reasons = [part.unclipped for part in self.parts]
        return None if None in reasons else reasons[0]

    def fit(self, d_model: int) -> None:
        for index, part in enumerate(self.parts):
            under(f"parts.{index}", part.fit, d_model)
        abstract(self, d_model)  # raises where the parts do not fit together

    def kept(self, d_model: int) -> Self:
        return dataclasses.replace(self, parts=tuple(part.kept(d_model) for part in self.parts))

    def settled(self, d_model: int) -> Self:
        return dataclasses.replace(self, parts=tuple(part.settled(d_model) for part in self.parts))

    def from_weights(self, d_model: int) -> Self:
        return dataclasses.replace(self, parts=tuple(part.from_weights(d_model) for part in self.parts))

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        return tuple(use for part in self.parts for use in part.carries(d_model))

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        return tuple(kind for part in self.parts for kind in part.head_kinds(d_model))

    def build(self, d_model: int, ctx: BuildContext) -> Parallel:
        return Parallel(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return sum(part.mixing_flops(d_model, seq_len) for part in self.parts)


class NormedHeads(AroundHeads):
    """The heads of `inner`, normalised side by side if there is a norm; projected by `inner`, or left for a projection that is shared."""

    def __init__(self, inner: HeadMixer, norm: RMSNorm | None, *, projects: bool):
        self.inner, self.norm, self.projects, self.num_heads = inner, norm, projects, inner.num_heads

    def output(self, o):
        heads = join_heads(o) if self.norm is None else self.norm(join_heads(o))
        return self.inner.output(split_heads(heads, self.num_heads)) if self.projects else heads


class Parallel(Mixer):
    """See `ParallelConfig`. The heads are those of the parts, one part after another; so are states and what is shown."""

    def __init__(self, config: ParallelConfig, d_model: int, ctx: BuildContext):
        self.config = config
        parts = [part.build(d_model, ctx) for part in config.parts]
        self.num_heads = sum(part.num_heads for part in parts)
        opened = config.norm == "heads" or config.shared_output
        widths = [_heads_width(config, index, part) for index, part in enumerate(parts)] if opened else []
        self.o = self._shared(parts, widths, d_model, ctx) if config.shared_output else None

        def norms(dims: list[int], axis: str | None) -> list[RMSNorm]:
            return [RMSNorm(ctx, dim, eps=config.norm_eps, axis=axis) for dim in dims]

        self.norms = nnx.List(norms([d_model] * len(parts), None)) if config.norm == "outputs" else None
        if opened:
            between = norms(widths, HEADS) if config.norm == "heads" else [None] * len(parts)
            pairs: Any = zip(parts, between, strict=True)
            parts = [NormedHeads(part, norm, projects=not config.shared_output) for part, norm in pairs]
        self.parts = nnx.List(parts)

    @property
    def projected(self) -> list[bool]:
        return [own for part in self.parts for own in part.projected]

    @staticmethod
    def _shared(parts: list[Mixer], widths: list[int], d_model: int, ctx: BuildContext) -> Dense:
        """One output projection, in place of those of the parts."""
        if len(set(widths)) > 1:
            raise ValueError(
                f"shared_output=True needs parts whose heads are equally wide together, not {widths}; "
                "change their head counts or widths, or use shared_output=False"
            )
        for part in parts:
            del _innermost(part).o
        return Dense(ctx, widths[0], d_model, (HEADS, EMBED), init=ctx.residual_init)

    def _read(self, x: jax.Array) -> list[jax.Array]:
        """What each part reads."""
        factors = self.config.in_multipliers or (1.0,) * len(self.parts)
        return [x if factor == 1.0 else x * jnp.asarray(factor, x.dtype) for factor in factors]

    def _join(self, outputs: list[jax.Array]) -> jax.Array:
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        if self.config.out_multipliers is not None:
            outputs = [y * jnp.asarray(factor, y.dtype) for factor, y in zip(self.config.out_multipliers, outputs, strict=True)]
        total = functools.reduce(jnp.add, outputs)
        total = total / len(outputs) if self.config.join == "mean" else total
        return total if self.o is None else self.o(total)

    def __call__(self, x, *, at, carry, observer=None):
        outputs: list[jax.Array] = []
        losses: dict[str, jax.Array] = {}
        looks: tuple[Look, ...] = ()
        counts: dict[str, Any] = {}
        heads = 0
        for index, (part, read) in enumerate(zip(self.parts, self._read(x), strict=True)):
            mixed = part(read, at=at, carry=carry, observer=behind(observer, heads))
            heads += part.num_heads
            outputs.append(mixed.y)
            carry, looks = mixed.carry, looks + mixed.looks
            losses |= {name: losses.get(name, 0) + value for name, value in mixed.losses.items()}
            counts |= {str(index): mixed.counts} if mixed.counts else {}
        return Mixed(self._join(outputs), carry, losses, looks, counts)

    def settle(self, counts):
        for index, own in counts.items():
            self.parts[int(index)].settle(own)

    def clip(self, ratio, alpha):
        ends = list(itertools.accumulate(part.num_heads for part in self.parts))
        for part, own in zip(self.parts, jnp.split(ratio, ends[:-1], axis=-1), strict=True):
            part.clip(own, alpha)

    def init_state(self, batch_size, max_len):
        return [part.init_state(batch_size, max_len) for part in self.parts]

    def prefill(self, x, state, *, at, carry):
        return self._each("prefill", x, state, at, carry)

    def step(self, x, state, *, at, carry):
        return self._each("step", x, state, at, carry)

    def _each(self, method, x, state, at, carry):
        outputs, after = [], []
        for part, read, old in zip(self.parts, self._read(x), state, strict=True):
            y, carry, new = getattr(part, method)(read, old, at=at, carry=carry)
            outputs.append(y)
            after.append(new)
        return self._join(outputs), carry, after


def _innermost(part: Mixer) -> Any:
    """The mixer in `part` that projects its heads."""
    while isinstance(inner := getattr(part, "inner", None), HeadMixer):
        part = inner
    return part


def _heads_width(config: ParallelConfig, index: int, part: Mixer) -> int:
    """Channels of the heads of `part` side by side. Raises ValueError where it has no heads, or no projection `o` of them."""
    projection = getattr(_innermost(part), "o", None)
    if not isinstance(part, HeadMixer) or not isinstance(projection, Dense):
        raise ValueError(
            f"parts.{index}={config.parts[index].name} has no heads before an output projection of its own to normalise or to share; "
            "use norm='outputs' or None, and shared_output=False"
        )
    return projection.kernel.shape[-2]

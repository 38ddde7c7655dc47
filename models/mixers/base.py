"""The mixer contract and the registry.

A mixer is a frozen config and a module, in one file, found by its registered name: nothing else is edited to add one. Most mixers
have heads whose output is a weighted sum of values; they subclass `HeadMixer`, write the pieces listed there, and get training,
decoding, Mixture-of-Head wrapping and diagnostics from it.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from plait.models.build import BuildContext
from plait.models.mixers.stats import ProbeConfig, Stats, attention_statistics, start_ratio

Kind = Literal["full", "linear", "sparse", "parallel"]
State = Any
"""Decode memory of a mixer: a pytree of arrays of fixed shape, batch first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Options of a mixer. Answers every question that needs no arrays."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    source: ClassVar[str]
    """Paper, as `Title (arXiv id)`."""

    @classmethod
    def example(cls) -> Self:
        """A small config for width 64, for tests and tables; override where the defaults do not fit it."""
        return cls()

    @abc.abstractmethod
    def build(self, d_model: int, ctx: BuildContext) -> Mixer:
        """The module of this config for width `d_model`. Raises ValueError where the two do not fit."""

    @abc.abstractmethod
    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        """Forward operations per token besides the projections: 2 per multiply-add, the mean over a causal `seq_len`."""

    def head_count(self, d_model: int) -> int:
        """Number of output heads at width `d_model`."""
        return _abstract(self, d_model).num_heads

    def num_params(self, d_model: int) -> int:
        """Trained parameters."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(_abstract(self, d_model), nnx.Param)))

    def flops(self, d_model: int, seq_len: int) -> float:
        """Forward operations per token: projections (2 per weight) and mixing."""
        params = jax.tree.leaves(nnx.state(_abstract(self, d_model), nnx.Param), is_leaf=lambda p: isinstance(p, nnx.Variable))
        return 2.0 * sum(math.prod(p.shape) for p in params if p.get_metadata().get("decay")) + self.mixing_flops(
            d_model, seq_len
        )

    def state_bytes(self, d_model: int, max_len: int, dtype: Any) -> int:
        """Bytes of decode state of one sequence, caches kept in `dtype`."""
        state = jax.eval_shape(lambda: _abstract(self, d_model, jnp.dtype(dtype).name).init_state(1, max_len))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.lru_cache(maxsize=256)
def _abstract(config: MixerConfig, d_model: int, dtype: str = "float32") -> Any:
    def create() -> Mixer:
        ctx = BuildContext(layer_index=0, num_layers=1, rngs=nnx.Rngs(0), seq_len=1, compute_dtype=jnp.dtype(dtype))
        return config.build(d_model, ctx)

    return nnx.eval_shape(create)


class Mixer(nnx.Module, abc.ABC):
    """A token mixer of `x` `[B, T, D]`. `segment_ids` and `positions` are int32 `[B, T]`: id 0 is padding, positions restart in
    each segment. Causal always; nothing crosses a segment border.
    """

    num_heads: int

    @abc.abstractmethod
    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, Stats | None]:
        """Training and scoring: `y [B, T, D]`, and statistics when `probe` asks or the layer adds a loss."""

    @abc.abstractmethod
    def init_state(self, batch_size: int, max_len: int) -> State:
        """Empty decode state for sequences of at most `max_len` tokens."""

    @abc.abstractmethod
    def prefill(self, x: jax.Array, state: State, *, segment_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, State]:
        """As `__call__` on left-padded prompts, from the empty `state`; returns the state after the last token."""

    @abc.abstractmethod
    def step(self, x: jax.Array, state: State, *, positions: jax.Array) -> tuple[jax.Array, State]:
        """One token: `x [B, D]`, `positions [B]`."""

    def implied_attention(self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """`A [B, H, T, S]` float32 such that head outputs before norm and projection are `A @ v`."""
        raise NotImplementedError(f"{type(self).__name__} is not linear in its values; it has no implied attention")


class Inputs(Protocol):
    """What `HeadMixer.project` returns: at least the values; `[B, T, Hkv, V]` with Hkv dividing the number of heads."""

    v: jax.Array


class HeadMixer(Mixer):
    """A mixer whose head h outputs `o_h = A_h v_h`. Subclasses write `project`, `attend`, `implied`, `init_state`, `output`;
    `finish` (per-head norm, gates), `attend_step` (when decoding differs), `observe` and `auxiliary_loss` where they have them.
    """

    @abc.abstractmethod
    def project(
        self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, state: State | None
    ) -> tuple[Any, State | None]:
        """Queries, keys, values and gates of `x` as a NamedTuple with field `v`; advances the state's convolutions."""

    @abc.abstractmethod
    def attend(
        self, inputs: Any, *, segment_ids: jax.Array, positions: jax.Array, state: State | None
    ) -> tuple[jax.Array, State | None]:
        """Head outputs `[B, T, H, V]` and, when `state` is given, the state after the last token."""

    @abc.abstractmethod
    def implied(self, inputs: Any, rows: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Implied attention of the query positions `rows` `[R]`: `[B, H, R, S]`."""

    @abc.abstractmethod
    def output(self, o: jax.Array) -> jax.Array:
        """Projects finished heads `[B, T, H, V]` to `[B, T, D]`."""

    def finish(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """Per-head normalisation and gating between `attend` and `output`; `x` is the layer's input."""
        return o

    def attend_step(self, inputs: Any, *, positions: jax.Array, state: State) -> tuple[jax.Array, State]:
        """`attend` for one new token (T = 1); a recurrent mixer's is `attend` itself."""
        return self.attend(inputs, segment_ids=jnp.ones_like(positions), positions=positions, state=state)

    def mix(self, inputs: Any, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The head outputs of a training pass; `x` for mixers that choose heads by it."""
        return self.attend(inputs, segment_ids=segment_ids, positions=positions, state=None)[0]

    def attend_active(self, inputs: Any, active: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """`attend` of a training pass where only the outputs at `active`, bool `[B, T, H]`, are used; others may be anything finite."""
        return self.attend(inputs, segment_ids=segment_ids, positions=positions, state=None)[0]

    def observe(self, inputs: Any, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        """Further fields of `Stats` for the probed sequences, beside those every head mixer has."""
        return {}

    def auxiliary_loss(self, x: jax.Array, *, segment_ids: jax.Array) -> jax.Array | None:
        """A loss of this layer's own (routing balance), coefficient applied."""
        return None

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig | None = None
    ) -> tuple[jax.Array, Stats | None]:
        inputs, _ = self.project(x, segment_ids=segment_ids, positions=positions, state=None)
        o = self.mix(inputs, x, segment_ids=segment_ids, positions=positions)
        y = self.output(self.finish(o, x))
        loss = self.auxiliary_loss(x, segment_ids=segment_ids)
        if probe is None:
            return y, None if loss is None else Stats(auxiliary_loss=loss)
        keep = probe.pick_sequences(x.shape[0])
        inputs, x, segment_ids, positions = jax.lax.stop_gradient(
            jax.tree.map(lambda a: a[keep], (inputs, x, segment_ids, positions))
        )
        return y, Stats(
            auxiliary_loss=loss, **self.statistics(inputs, x, segment_ids=segment_ids, positions=positions, probe=probe)
        )

    def statistics(
        self, inputs: Any, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array, probe: ProbeConfig
    ) -> dict[str, jax.Array | None]:
        """All probe statistics of already selected sequences."""
        where = {"segment_ids": segment_ids, "positions": positions}
        rows = probe.pick_rows(positions.shape[1])
        drain = start_ratio(jnp.linalg.norm(inputs.v.astype(jnp.float32), axis=-1), **where)  # [Hkv]
        attention = self.implied(inputs, rows, **where)
        by_rows = attention_statistics(attention, rows, **where, first_k=probe.first_k)
        observed = self.observe(inputs, x, **where)
        if (first := observed.pop("sink_first", None)) is not None:
            by_rows["sink"] = by_rows["sink"].at[:, 0].set(first)
        return {
            "attention": attention if probe.keep_attention else None,
            "value_drain": jnp.repeat(drain, self.num_heads // drain.shape[0]),
            **by_rows,
            **observed,
        }

    def prefill(self, x: jax.Array, state: State, *, segment_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, State]:
        inputs, state = self.project(x, segment_ids=segment_ids, positions=positions, state=state)
        o, state = self.attend(inputs, segment_ids=segment_ids, positions=positions, state=state)
        return self.output(self.finish(o, x)), state

    def step(self, x: jax.Array, state: State, *, positions: jax.Array) -> tuple[jax.Array, State]:
        x, positions = x[:, None], positions[:, None]
        inputs, state = self.project(x, segment_ids=jnp.ones_like(positions), positions=positions, state=state)
        o, state = self.attend_step(inputs, positions=positions, state=state)
        return self.output(self.finish(o, x))[:, 0], state

    def implied_attention(self, x: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        inputs, _ = self.project(x, segment_ids=segment_ids, positions=positions, state=None)
        return self.implied(inputs, jnp.arange(x.shape[1]), segment_ids=segment_ids, positions=positions)


C = TypeVar("C", bound=type[MixerConfig])
_registry: dict[str, type[MixerConfig]] = {}


def register(name: str, *, kind: Kind | None, source: str) -> Callable[[C], C]:
    """Class decorator: makes a config known by `name` to patterns, the command line, the contract suite and the docs.

    `kind=None` is for wrappers, which have a `kind` property of their own.
    """

    def add(config: C) -> C:
        if name in _registry:
            raise ValueError(f"mixer {name!r} is registered twice: {_registry[name].__module__} and {config.__module__}")
        config.name, config.source = name, source
        if kind is not None:
            config.kind = kind
        _registry[name] = config
        return config

    return add


def mixer_configs() -> dict[str, type[MixerConfig]]:
    """Every registered mixer config by name; imports each module of this package once."""
    package = importlib.import_module("plait.models.mixers")
    for module in pkgutil.walk_packages(package.__path__, "plait.models.mixers."):
        importlib.import_module(module.name)
    return dict(sorted(_registry.items()))


def mixer_config(name: str) -> type[MixerConfig]:
    """The config class registered as `name`. Raises ValueError naming the nearest mixers."""
    known = mixer_configs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2) or list(known)
        raise ValueError(
            f"mixer {name!r} is not registered; did you mean {' or '.join(map(repr, near))}? (`launch.py list mixers` shows all)"
        )
    return known[name]

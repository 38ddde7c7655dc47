"""The mixer contract.

A mixer is a frozen config and a module, in one file, found by its registered name: nothing else is edited to add one. Most mixers
have heads whose output is a weighted sum of values; they subclass `HeadMixer` (or their family's base), write the pieces listed
there, and get training, decoding, Mixture-of-Head wrapping and diagnostics from it.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from plait.configs.components import Component, Registry, at
from plait.kernels import Tokens
from plait.kernels.dispatch import Op, called_by
from plait.models.build import PRODUCTS, BuildContext
from plait.models.looks.look import Look, Observer, look
from plait.models.looks.taps import tapped
from plait.models.stream import Carry, CarryUse

Kind = Literal["full", "linear", "sparse", "parallel"]
HeadKind = Literal["attention", "state"]
Direction = Literal["causal", "bidirectional"]
State = Any
"""Decode memory of a mixer: a pytree of arrays of fixed shape, batch first."""
Losses = Mapping[str, jax.Array]
"""Auxiliary losses by name (`balance/moh`), float32 scalars with their coefficients applied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Component, abc.ABC):
    """Options of a mixer. Answers every question that needs no arrays."""

    kind: ClassVar[Kind]
    proof: ClassVar[str] = "the contract suite"
    """What its equations were checked against besides, in a test marked `proves(NAME)`."""
    directions: ClassVar[tuple[Direction, ...]] = ("causal",)
    """Whether a token may see those before it only, or all of its document (`model.causal`), or either."""
    opaque: ClassVar[str | None] = None
    """Why its heads have no implied attention; None where they have."""

    @property
    def unclipped(self) -> str | None:
        """Why QK-clip has nothing to do in it; None where it has."""
        return "has no heads whose largest logit their projections alone make"

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

    def between_flops(self, d_model: int, seq_len: int) -> float:
        """Of `mixing_flops` those of a token with others: all, unless a mixer has products with weights among them."""
        return self.mixing_flops(d_model, seq_len)

    def seen_keys(self, d_model: int, seq_len: int) -> float | None:
        """Keys that a causal query sees, the mean over a sequence and the heads; None where no number is told."""
        return None

    def sees_whole(self, d_model: int, seq_len: int) -> bool:
        """Whether every causal query of a sequence is known to see all tokens up to itself."""
        seen = self.seen_keys(d_model, seq_len)
        return seen is not None and math.isclose(seen, (seq_len + 1) / 2, rel_tol=1e-13)

    @property
    def whole_without(self) -> Mapping[str, int]:
        """By option, ids of tokens: in rows that have none of them every query sees all up to itself."""
        return {}

    @property
    def token_ids(self) -> Mapping[str, int]:
        """By option, ids of tokens that it looks for in the text."""
        return {}

    def decode_flops(self, d_model: int, context: int) -> float:
        """Operations besides the projections of the token after `context` others: what it adds to those of a causal sequence, unless
        decoding works otherwise."""
        through = lambda length: length * self.mixing_flops(d_model, length)
        return through(context + 1) - through(context)

    def fit(self, d_model: int) -> None:
        """Raises ValueError, in a message that begins with the field, where this config does not fit the width."""
        self.head_kinds(d_model)

    def kept(self, d_model: int) -> Self:
        """This config as a run keeps it: with what it reads from a file written out, which may be gone or another later."""
        return self

    def settled(self, d_model: int) -> Self:
        """This config with what it leaves to follow from the width written out."""
        return self

    def function(self, d_model: int) -> Self:
        """This config, settled, without what says how it is trained: configs of which these are equal compute the same."""
        return self.settled(d_model)

    def from_weights(self, d_model: int) -> Self:
        """This config, settled, with what a run from its weights (`init_from`) may set otherwise at one value."""
        return self.settled(d_model)

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        """What the mixer reads and writes of `Stream.carry`."""
        return ()

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence, in training and decoding; None where any number will do."""
        positions = getattr(self, "positions", None)
        return None if positions is None else positions.longest

    @property
    def told_as(self) -> str:
        """What layers of it are called where they are told of by kind: a window is no full attention."""
        return "window" if self.kind == "full" and getattr(self, "window_size", None) is not None else self.kind

    @property
    def head_channels(self) -> int:
        """Channels of a key and of a value of a head, together; 0 of mixers without heads of one width."""
        return 2 * getattr(self, "head_dim", 0)

    def head_count(self, d_model: int) -> int:
        """Number of output heads at width `d_model`."""
        return abstract(self, d_model).num_heads

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        """What each head is: one that attends to tokens, or one that reads a state."""
        return ("state" if self.kind == "linear" else "attention",) * self.head_count(d_model)

    def num_params(self, d_model: int) -> int:
        """Trained parameters."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(abstract(self, d_model), nnx.Param)))

    def product_flops(self, d_model: int) -> float:
        """Forward operations per token in products with weights."""
        return products(abstract(self, d_model))

    def flops(self, d_model: int, seq_len: int) -> float:
        """Forward operations per token: products with weights (2 per weight) and mixing."""
        return self.product_flops(d_model) + self.mixing_flops(d_model, seq_len)

    def ops(self, d_model: int) -> list[Op]:
        """The ops of `plait.kernels` that a training pass calls."""
        return list(_ops(self, d_model))

    def state_bytes(self, d_model: int, max_len: int, dtype: Any) -> int:
        """Bytes of decode state of one sequence, caches kept in `dtype`."""
        state = jax.eval_shape(lambda: abstract(self, d_model, jnp.dtype(dtype).name).init_state(1, max_len))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrapperConfig(MixerConfig):
    """Options of something around one mixer, which a pattern names as `wrapper+mixer`; of the mixer's kind."""

    mixer: MixerConfig
    """The wrapped mixer."""

    @property
    def kind(self):  # type: ignore[override]
        """That of the wrapped mixer."""
        return self.mixer.kind

    @property
    def told_as(self) -> str:
        return self.mixer.told_as

    @property
    def directions(self):  # type: ignore[override]
        """Those of the wrapped mixer."""
        return self.mixer.directions

    @property
    def opaque(self):  # type: ignore[override]
        """That of the wrapped mixer."""
        return self.mixer.opaque

    @property
    def unclipped(self) -> str | None:
        return self.mixer.unclipped

    @property
    def longest(self) -> int | None:
        return self.mixer.longest

    def fit(self, d_model: int) -> None:
        at("mixer", self.mixer.fit, d_model)
        super().fit(d_model)

    def kept(self, d_model: int) -> Self:
        return dataclasses.replace(self, mixer=self.mixer.kept(d_model))

    @property
    def token_ids(self) -> Mapping[str, int]:
        return {f"mixer.{name}": token for name, token in self.mixer.token_ids.items()}

    def carries(self, d_model: int) -> tuple[CarryUse, ...]:
        return self.mixer.carries(d_model)

    def head_kinds(self, d_model: int) -> tuple[HeadKind, ...]:
        return self.mixer.head_kinds(d_model)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.mixer.mixing_flops(d_model, seq_len)

    def seen_keys(self, d_model: int, seq_len: int) -> float | None:
        return self.mixer.seen_keys(d_model, seq_len)

    def decode_flops(self, d_model: int, context: int) -> float:
        return self.mixer.decode_flops(d_model, context)


MIXERS: Registry[MixerConfig] = Registry("mixer", "plait.models.mixers", MixerConfig)
register = MIXERS.register


@functools.lru_cache(maxsize=256)
def abstract(config: MixerConfig, d_model: int, dtype: str = "float32") -> Any:
    """A module of a config without arrays, in the first of its directions."""
    causal = config.directions[0] == "causal"
    ctx = lambda: BuildContext(rngs=nnx.Rngs(0), seq_len=1, compute_dtype=jnp.dtype(dtype), causal=causal, shapes_only=True)
    return nnx.eval_shape(lambda: config.build(d_model, ctx()))


@functools.lru_cache(maxsize=256)
def _ops(config: MixerConfig, d_model: int) -> tuple[Op, ...]:
    x, number = jax.ShapeDtypeStruct((1, 8, d_model), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    graph, variables = nnx.split(abstract(config, d_model))
    run = lambda variables, x, at: nnx.merge(graph, variables)(x, at=at, carry={}).y
    return tuple(called_by(run, variables, x, Tokens(None, number, number)))


def products(module: nnx.Module) -> float:
    """Operations per token in products with the weights of a module: 2 per weight."""
    params = jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=lambda p: isinstance(p, nnx.Variable))
    return 2.0 * sum(math.prod(p.shape) for p in params if p.get_metadata()["role"] in PRODUCTS)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """What a mixer gives in a training pass."""

    y: jax.Array
    """`[B, T, D]`."""
    carry: Carry
    losses: Losses = dataclasses.field(default_factory=dict)
    looks: tuple[Look, ...] = ()
    """What it shows to an observer: one look, or one a parallel part."""
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `settle` needs of the tokens: sums by name, float32, of parallel parts by part."""


class Mixer(nnx.Module, abc.ABC):
    """A token mixer of `x` `[B, T, D]`, whose tokens stand where `at` says. Nothing crosses a segment border.

    `carry` is what earlier layers left; a mixer returns it with what it leaves itself.
    """

    num_heads: int

    @property
    def projected(self) -> list[bool]:
        """Which heads have an output of their own before a projection, and so can be left out."""
        return [False] * self.num_heads

    def settle(self, counts: Mapping[str, Any]) -> None:
        """Moves buffers once a step, after its gradient, by the counts of all its tokens; leading axes are stacked layers."""

    def clip(self, ratio: jax.Array, alpha: float) -> None:
        """Multiplies the logits of each head by its `ratio` `[..., H]`, 1 or less, in the projections of queries and keys: see QKClipConfig."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array, *, at: Tokens, carry: Carry, observer: Observer | None = None) -> Mixed:
        """Training and scoring; shows itself when an observer is there."""

    @abc.abstractmethod
    def init_state(self, batch_size: int, max_len: int) -> State:
        """Empty decode state for sequences of at most `max_len` tokens."""

    @abc.abstractmethod
    def prefill(self, x: jax.Array, state: State, *, at: Tokens, carry: Carry) -> tuple[jax.Array, Carry, State]:
        """As `__call__` on left-padded prompts, from the empty `state`; returns the state after the last token."""

    @abc.abstractmethod
    def step(self, x: jax.Array, state: State, *, at: Tokens, carry: Carry) -> tuple[jax.Array, Carry, State]:
        """One token, `[B, 1, D]`."""

    def implied_attention(self, x: jax.Array, *, at: Tokens, carry: Carry | None = None) -> jax.Array:
        """`A [B, H, T, S]` float32 such that head outputs before norm and projection are `A @ v`."""
        raise NotImplementedError(f"{type(self).__name__} is not linear in its values; it has no implied attention")


class Inputs(Protocol):
    """What `HeadMixer.project` returns: at least the values; `[B, T, Hkv, V]` with Hkv dividing the number of heads."""

    v: jax.Array


class HeadMixer(Mixer):
    """A mixer whose head h outputs `o_h = A_h v_h`.

    Subclasses write `project`, `attend`, `implied`, `init_state`, `output`; `finish` (per-head norm, gates), `share` where layers share
    something, `project_step`, `recall` and `attend_step` where decoding differs, `observe` and `auxiliary_losses` where they have them,
    `prepare` where those losses need what attending finds, `counts` and `settle` where buffers follow the tokens of a step.
    """

    @property
    def projected(self) -> list[bool]:
        return [True] * self.num_heads

    @abc.abstractmethod
    def project(self, x: jax.Array, *, at: Tokens, state: State | None) -> tuple[Any, State | None]:
        """Queries, keys, values and gates of `x` as a NamedTuple with field `v`; advances the state's convolutions."""

    @abc.abstractmethod
    def attend(self, inputs: Any, *, at: Tokens, state: State | None) -> tuple[jax.Array, State | None]:
        """Head outputs `[B, T, H, V]` and, when `state` is given, the state after the last token."""

    @abc.abstractmethod
    def implied(self, inputs: Any, rows: jax.Array, *, at: Tokens) -> jax.Array | None:
        """Implied attention of the query positions `rows` `[R]`: `[B, H, R, S]`; None where there is none (the config's `opaque`)."""

    @abc.abstractmethod
    def output(self, o: jax.Array) -> jax.Array:
        """Projects finished heads `[B, T, H, V]` to `[B, T, D]`."""

    def share(self, inputs: Any, carry: Carry) -> tuple[Any, Carry]:
        """Takes what earlier layers left into the inputs, and leaves what later ones take."""
        return inputs, carry

    def prepare(self, inputs: Any, *, at: Tokens) -> Any:
        """The inputs of a training pass, with what both `attend` and `auxiliary_losses` would make; probes see them without."""
        return inputs

    def recall(self, inputs: Any, carry: Carry, *, at: Tokens, state: State) -> tuple[Any, Carry, State]:
        """`share` for one new token; where decoding attends to a cache, the cache takes the token in and its entries are the inputs."""
        return *self.share(inputs, carry), state

    def finish(self, o: jax.Array, inputs: Any, x: jax.Array) -> jax.Array:
        """Per-head normalisation and gating between `attend` and `output`; `x` is the layer's input."""
        return o

    def project_step(self, x: jax.Array, *, at: Tokens, state: State) -> tuple[Any, State]:
        """`project` for one new token (T = 1), where decoding projects otherwise."""
        return self.project(x, at=at, state=state)

    def attend_step(self, inputs: Any, *, at: Tokens, state: State) -> tuple[jax.Array, State]:
        """`attend` for one new token; a recurrent mixer's is `attend` itself."""
        return self.attend(inputs, at=at, state=state)

    def mix(self, inputs: Any, x: jax.Array, *, at: Tokens) -> jax.Array:
        """The head outputs of a training pass; `x` for mixers that choose heads by it."""
        return self.attend(inputs, at=at, state=None)[0]

    def attend_active(self, inputs: Any, active: jax.Array, *, at: Tokens) -> jax.Array:
        """`attend` of a training pass where only the outputs at `active`, bool `[B, T, H]`, are used; others may be anything finite."""
        return self.attend(inputs, at=at, state=None)[0]

    def observe(self, inputs: Any, x: jax.Array, *, at: Tokens) -> dict[str, Any]:
        """What the mixer alone can tell of looked-at sequences, for probes to read by name (see `plait.models.looks.look`)."""
        return {}

    def auxiliary_losses(self, inputs: Any, x: jax.Array, *, at: Tokens) -> Losses:
        """Losses of this layer's own (routing balance), coefficients applied."""
        return {}

    def counts(self, inputs: Any, x: jax.Array, *, at: Tokens) -> Mapping[str, jax.Array]:
        """What `settle` needs of the tokens of a training pass, where buffers follow them."""
        return {}

    def __call__(self, x: jax.Array, *, at: Tokens, carry: Carry, observer: Observer | None = None) -> Mixed:
        at = at.placed(*x.shape[:2])
        inputs, _ = self.project(x, at=at, state=None)
        inputs, carry = self.share(inputs, carry)
        prepared = self.prepare(inputs, at=at)
        o = self.mix(prepared, x, at=at)
        y = self.output(tapped(observer, "heads", self.finish(o, inputs, x), at=at))
        looks = () if observer is None else (look(observer, at=at, x=x, mixer=self, inputs=inputs, o=o),)
        return Mixed(y, carry, self.auxiliary_losses(prepared, x, at=at), looks, self.counts(inputs, x, at=at))

    def prefill(self, x: jax.Array, state: State, *, at: Tokens, carry: Carry) -> tuple[jax.Array, Carry, State]:
        at = at.placed(*x.shape[:2])
        inputs, state = self.project(x, at=at, state=state)
        inputs, carry = self.share(inputs, carry)
        o, state = self.attend(inputs, at=at, state=state)
        return self.output(self.finish(o, inputs, x)), carry, state

    def step(self, x: jax.Array, state: State, *, at: Tokens, carry: Carry) -> tuple[jax.Array, Carry, State]:
        inputs, state = self.project_step(x, at=at, state=state)
        inputs, carry, state = self.recall(inputs, carry, at=at, state=state)
        o, state = self.attend_step(inputs, at=at, state=state)
        return self.output(self.finish(o, inputs, x)), carry, state

    def implied_attention(self, x: jax.Array, *, at: Tokens, carry: Carry | None = None) -> jax.Array:
        at = at.placed(*x.shape[:2])
        inputs, _ = self.project(x, at=at, state=None)
        inputs, _ = self.share(inputs, carry or {})
        weights = self.implied(inputs, jnp.arange(x.shape[1]), at=at)
        if weights is None:
            return super().implied_attention(x, at=at)
        return weights

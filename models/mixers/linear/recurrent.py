"""What the linear family shares: heads that read a state, which tokens decay and write.

A mixer is then its config, its projections and gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from plait.kernels import decay, decay_rows
from plait.models.axes import BATCH, EMBED, HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.layers.short_conv import Convolving
from plait.models.looks.look import GateValues
from plait.models.mixers.base import HeadMixer
from plait.models.mixers.heads import join_heads, split_heads

OutputGate = Literal["silu", "sigmoid", "linear"]
_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda y: y,
}


class RecurrentState(NamedTuple):
    """Decode memory of a recurrent mixer."""

    memory: jax.Array
    """`[B, H, K, V]` float32."""
    convs: Mapping[str, jax.Array]
    """The last inputs of each short convolution."""


class Decayed(NamedTuple):
    """Inputs of a recurrence that decays and adds: `S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`."""

    q: jax.Array
    """`[B, T, Hqk, K]`."""
    k: jax.Array
    v: jax.Array
    """`[B, T, H, V]`."""
    g: jax.Array
    """`[B, T, H]` or `[B, T, H, K]` float32, at most 0."""


class LowRank(nnx.Module):
    """`W_2 W_1 x (+ b)`: gates from a projection through a narrow waist."""

    def __init__(self, ctx: BuildContext, in_dim: int, rank: int, out_dim: int, *, use_bias: bool = False):
        self.down = Dense(ctx, in_dim, rank, (EMBED, None), role="gate")
        self.up = Dense(ctx, rank, out_dim, (None, HEADS), use_bias=use_bias, role="gate")

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_dim] -> [..., out_dim]`."""
        return self.up(self.down(x))


class Recurrent(Convolving, HeadMixer):
    """Heads with a state `[K, V]`, a norm and a gate on what they read, and an output projection.

    Subclasses set `head_dims`, write `project`, and call `gated_output` at the end of their `__init__`; the delta rule also sets
    `recur` and `recur_rows`. `project` returns the op's arrays first, in the op's order.
    """

    head_dims: tuple[int, int]
    """Channels of a key and of a value head."""
    recur: ClassVar[Callable[..., Any]] = staticmethod(decay)
    recur_rows: ClassVar[Callable[..., jax.Array]] = staticmethod(decay_rows)
    recur_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What both take besides."""
    scale: float | None = None
    """Multiplies the queries; None for `K^-1/2`."""
    gate: Any = None
    """The output gate's projection; None for no gate."""
    activation: OutputGate | None = None
    """What it goes through."""
    norm: Any
    """Of the heads, before the gate."""

    def gated_output(
        self,
        ctx: BuildContext,
        d_model: int,
        *,
        norm_eps: float,
        norm: Literal["head", "all"] = "head",
        norm_scale: bool = True,
        gate: OutputGate | None = "silu",
        gate_rank: int | None = None,
        gate_bias: bool = False,
    ) -> None:
        """Makes the output gate, the norm and the projection back.

        Args:
            norm: over each head, or over all heads together.
            norm_scale: whether the norm has a learned scale.
            gate: what the gate's projection goes through before it multiplies the normalised heads; None for no gate.
            gate_rank: inner width of the gate's projection; None for a full one.
            gate_bias: whether the gate's projection has a bias.
        """
        width = self.num_heads * self.head_dims[1]
        self.activation, self.norm_over = gate, norm
        self.gate: Dense | LowRank | None
        if gate is None:
            self.gate = None
        elif gate_rank is None:
            self.gate = Dense(ctx, d_model, width, (EMBED, HEADS), use_bias=gate_bias, role="gate")
        else:
            self.gate = LowRank(ctx, d_model, gate_rank, width, use_bias=gate_bias)
        normed, axis = (self.head_dims[1], None) if norm == "head" else (width, HEADS)
        self.norm = RMSNorm(ctx, normed, eps=norm_eps, axis=axis, with_scale=norm_scale)
        self.o = Dense(ctx, width, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads))

    def heads(self, y: jax.Array, num_heads: int | None = None) -> jax.Array:
        """`[B, T, H * K]` to `[B, T, H, K]`, laid out by head."""
        return constrain(split_heads(y, num_heads or self.num_heads), (BATCH, LENGTH, HEADS, None))

    def _arrays(self, inputs: Any) -> tuple[jax.Array, ...]:
        return tuple(inputs)

    def attend(self, inputs, *, at, state):
        memory = None if state is None else state.memory
        o, memory = self.recur(*self._arrays(inputs), scale=self.scale, initial_state=memory, at=at, **self.recur_options)
        return o, None if state is None else state._replace(memory=memory)

    def init_state(self, batch_size, max_len):
        memory = constrain(jnp.zeros((batch_size, self.num_heads, *self.head_dims), jnp.float32), (BATCH, HEADS, None, None))
        return RecurrentState(memory, self.empty_convs(batch_size))

    def finish(self, o, inputs, x):
        y = self.norm(o) if self.norm_over == "head" else split_heads(self.norm(join_heads(o)), self.num_heads)
        gate = self.output_gate(inputs, x)
        return y if gate is None else y * gate

    def output_gate(self, inputs: Any, x: jax.Array) -> jax.Array | None:
        """What multiplies the heads, `[B, T, H, V]`; None where nothing does."""
        if self.gate is None or self.activation is None:
            return None
        return _ACTIVATIONS[self.activation](split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        q, k, _, *gates = self._arrays(inputs)
        return self.recur_rows(q, k, *gates, rows=rows, scale=self.scale, at=at, **self.recur_options)

    def observe(self, inputs, x, *, at):
        _, memory, stats = self.recur(*self._arrays(inputs), scale=self.scale, at=at, return_stats=True, **self.recur_options)
        return {"memory": memory, "recurrence": stats, "gates": self.gates_told(inputs, x)}

    def gates_told(self, inputs: Any, x: jax.Array) -> dict[str, GateValues]:
        """The gates that `observe` tells: decays where the inputs have `g`, and the output's."""
        g, output = getattr(inputs, "g", None), self.output_gate(inputs, x)
        found = {} if g is None else {"decay": GateValues(jnp.exp(g), 1.0)}
        return found if output is None else {**found, "output": GateValues(output, 1.0 if self.activation == "sigmoid" else None)}

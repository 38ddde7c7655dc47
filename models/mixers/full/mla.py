"""Multi-head latent attention: keys and values of all heads come from one small latent, which alone is cached."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.components import at as under
from plait.configs.domains import Channels, Epsilon, Heads
from plait.kernels import Mask, SelectedBlocks, Tokens, attention, attention_rows, column_mass, first_masses
from plait.models.axes import BATCH, EMBED, HEADS, KV_HEADS, LENGTH, constrain
from plait.models.build import BuildContext
from plait.models.layers.cache import Slots
from plait.models.layers.linear import Dense
from plait.models.layers.norms import RMSNorm
from plait.models.looks.look import GateValues, Selection
from plait.models.mixers.base import Direction, HeadMixer, MixerConfig, register
from plait.models.mixers.full.softmax import with_positions
from plait.models.mixers.heads import join_heads, require_divides, split_heads
from plait.models.positions.rotary import RotaryConfig


@register(
    "mla",
    kind="full",
    source="DeepSeek-V2 (2405.04434); in groups, Hardware-Efficient Attention for Fast Decoding (2505.21487)",
    proof="transformers: DeepSeek-V3",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(MixerConfig):
    """`z_ij = (q_nope_i . k_nope_j + q_rope_i . k_rope_j) / sqrt(nope_head_dim + rope_head_dim)`, `[k_nope, v] = W_UKV c`.

    `c = norm(W_DKV x)` is cached with the one rotated key `k_rope` that all heads share; decoding folds W_UK into the queries and W_UV
    into the outputs, and attends to the latents themselves.

    Grouped latent attention has several latents, each with its own norm, and an equal share of the heads reads each one; `k_rope` stays
    one for all. With YaRN the logits are multiplied by the square of its factor, and turned channels are not, as in DeepSeek.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("causal", "bidirectional")

    num_heads: Heads = 16
    """Heads."""
    kv_rank: Channels = 512
    """Channels of a cached latent."""
    num_latents: Heads = 1
    """Latents, a divisor of num_heads (GLA: 2, of half the channels each)."""
    q_rank: Channels | None = None
    """Channels of the queries' latent; None projects queries from the residual stream."""
    nope_head_dim: Channels = 128
    """Channels of a query and key head without position."""
    rope_head_dim: Channels = 64
    """Rotated channels of a query head, and of the key that all heads share."""
    v_head_dim: Channels = 128
    """Channels of a value head."""
    positions: RotaryConfig | None = RotaryConfig()
    """Rotary embedding of the channels that have positions; None rotates nothing (NoPE, as in Kimi Linear)."""
    latent_norm: bool = True
    """Normalise the latents of keys and values; without it keys and values are low-rank projections, as those that are made of MHA's."""
    gate: Literal["elementwise", "headwise"] | None = None
    """Sigmoid gate of the head outputs, from the layer's input (arXiv 2505.06708); Ling 3 has one a head."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norms of the latents."""

    def check(self) -> None:
        require_divides(("num_latents", self.num_latents), ("num_heads", self.num_heads))
        if self.positions is not None:
            under("positions", self.positions.fit, self.rope_head_dim)

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_positions(fields)

    @classmethod
    def example(cls) -> MLAConfig:
        return cls(num_heads=4, kv_rank=24, q_rank=32, nope_head_dim=16, rope_head_dim=8, v_head_dim=12)

    @property
    def unclipped(self) -> str | None:
        return None

    def build(self, d_model: int, ctx: BuildContext) -> MLA:
        return MLA(self, d_model, ctx)

    @property
    def head_channels(self) -> int:
        return self.nope_head_dim + self.rope_head_dim + self.v_head_dim

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return 2.0 * self.num_heads * self.head_channels * (seq_len + 1) / 2

    def decode_flops(self, d_model: int, context: int) -> float:
        return 2.0 * self.num_heads * (2 * self.kv_rank + self.rope_head_dim) * (context + 1)  # of the latents themselves


class MLAInputs(NamedTuple):
    q: jax.Array  # [B, T, H, nope + rope]; absorbed, [B, T, H, kv_rank + rope]
    k: jax.Array  # [B, S, H, nope + rope]; absorbed, a head for each latent: it and the rotated key
    v: jax.Array  # [B, S, H, V]; absorbed, a head for each latent
    latent: jax.Array  # [B, T, G, kv_rank]
    k_rope: jax.Array  # [B, T, rope]
    kv_at: Tokens | None = None  # where the keys stand, when they are a cache's
    index: Any = None  # what chooses among the keys, where something does
    selected: SelectedBlocks | None = None  # the keys that each query sees, where not all
    attended: tuple[jax.Array, jax.Array] | None = None  # o [B, T, H, V] and lse [B, T, H], where they are known


class Latents(NamedTuple):
    q_nope: jax.Array  # [B, T, H, nope]
    q_rope: jax.Array  # [B, T, H, rope]
    latent: jax.Array  # [B, T, G, kv_rank]
    k_rope: jax.Array  # [B, T, rope], the key that all heads share
    index: Any = None  # as above


class MLA(HeadMixer):
    """See `MLAConfig`."""

    def __init__(self, config: MLAConfig, d_model: int, ctx: BuildContext):
        self.config, self.num_heads, self.dtype = config, config.num_heads, ctx.compute_dtype
        self.rotary = None if config.positions is None else config.positions.build(ctx, d_model, self.num_heads)
        sharper = 1.0 if config.positions is None else config.positions.magnitude**2
        self.mask, self.scale = Mask(causal=ctx.causal), sharper * (config.nope_head_dim + config.rope_head_dim) ** -0.5
        heads, latents = (1, self.num_heads), config.num_latents * config.kv_rank
        self.q_down = Dense(ctx, d_model, config.q_rank, (EMBED, None)) if config.q_rank is not None else None
        self.q_norm = RMSNorm(ctx, config.q_rank, eps=config.norm_eps) if config.q_rank is not None else None
        q_width = self.num_heads * (config.nope_head_dim + config.rope_head_dim)
        self.q = Dense(ctx, config.q_rank or d_model, q_width, (EMBED if config.q_rank is None else None, HEADS), heads=heads)
        self.kv_down = Dense(ctx, d_model, latents, (EMBED, None))
        self.k_rope = Dense(ctx, d_model, config.rope_head_dim, (EMBED, None))
        self.kv_norm = RMSNorm(ctx, latents, eps=config.norm_eps, groups=config.num_latents) if config.latent_norm else None
        self.k_up = Dense(ctx, config.kv_rank, self.num_heads * config.nope_head_dim, (None, HEADS), heads=heads)
        self.v_up = Dense(ctx, config.kv_rank, self.num_heads * config.v_head_dim, (None, HEADS), heads=heads)
        self.o = Dense(
            ctx, self.num_heads * config.v_head_dim, d_model, (HEADS, EMBED), init=ctx.residual_init, heads=(0, self.num_heads)
        )
        gate_width = {"elementwise": self.num_heads * config.v_head_dim, "headwise": self.num_heads}.get(config.gate or "")
        self.gate = Dense(ctx, d_model, gate_width, (EMBED, HEADS), role="gate") if gate_width else None
        self.slots = Slots()

    def latents(self, x: jax.Array, at: Tokens) -> Latents:
        """What queries, keys and values are made of."""
        queries = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = constrain(split_heads(self.q(queries), self.num_heads), (BATCH, LENGTH, HEADS, None))
        q_nope, q_rope = jnp.split(q, [self.config.nope_head_dim], axis=-1)
        k_rope = self.k_rope(x)[:, :, None]
        if self.rotary is not None:
            q_rope, k_rope = (self.rotary.turn_by(y, at) for y in (q_rope, k_rope))
        latents = self.kv_down(x)
        latents = latents if self.kv_norm is None else self.kv_norm(latents)
        index = self.index(x, queries, at)
        return Latents(q_nope, q_rope, split_heads(latents, self.config.num_latents), k_rope[:, :, 0], index)

    def index(self, x: jax.Array, queries: jax.Array, at: Tokens) -> Any:
        """What chooses among the keys, of the layer's input and of what the heads' queries are projections of; None by default."""
        return None

    def project(self, x, *, at, state):
        q_nope, q_rope, latent, k_rope, index = self.latents(x, at)
        k_nope, v = (
            constrain(
                jnp.einsum("btgc,cgrk->btgrk", latent, self._up(dense)).reshape(*latent.shape[:2], self.num_heads, -1),
                (BATCH, LENGTH, HEADS, None),
            )
            for dense in (self.k_up, self.v_up)
        )
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, shared], -1)
        return MLAInputs(q, k, v, latent, k_rope, index=index), state

    def project_step(self, x, *, at, state):
        new = self.latents(x, at)
        q_nope, q_rope, latent, k_rope, index = new
        state = self.slots.write(state, self.kept(new), at)
        latents, shared = state.entries["latent"], state.entries["k_rope"]
        q, k = self.absorbed(q_nope, q_rope, latents, shared)
        return MLAInputs(q, k, latents, latent, k_rope, state.at, index), state

    def operands(self, inputs: MLAInputs, at: Tokens) -> dict[str, Any]:
        """What attends to what in whole sequences: arguments of the op. With `value_dim` queries attend to the latents, of which outputs are
        mixtures."""
        return {"q": inputs.q, "k": inputs.k, "v": inputs.v}

    def attended(self, inputs: MLAInputs, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """The heads' outputs `[B, T, H, v_head_dim]` and log-normalisers `[B, T, H]` in whole sequences."""
        operands = self.operands(inputs, at)
        o, lse = attention(**operands, at=at, return_lse=True, **self.options(inputs))
        return self._from_latents(o) if "value_dim" in operands else o, lse

    def attend(self, inputs, *, at, state):
        o, _ = inputs.attended or self.attended(inputs, at)
        if state is not None:
            state = self.slots.write(state, self.kept(inputs), at)
        return o, state

    def attend_step(self, inputs, *, at, state):
        o: Any = attention(inputs.q, inputs.k, inputs.v, at=at, kv_at=inputs.kv_at, **self.options(inputs))
        return self._from_latents(o), state

    def clip(self, ratio, alpha):
        own, rotated = self.config.nope_head_dim, self.config.rope_head_dim
        factors = [jnp.repeat(by[..., None], width, axis=-1) for by, width in ((ratio**alpha, own), (ratio, rotated))]
        self.q.scale_outputs(join_heads(jnp.concatenate(factors, axis=-1)))
        self.k_up.scale_outputs(jnp.repeat(ratio ** (1 - alpha), own, axis=-1))

    def options(self, inputs: MLAInputs) -> dict[str, Any]:
        """What makes the weights: arguments of the op."""
        return {"mask": self.mask, "scale": self.scale, "selected": inputs.selected}

    def absorbed(
        self, q_nope: jax.Array, q_rope: jax.Array, latents: jax.Array, k_rope: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Queries `[B, T, H, kv_rank + rope]` and keys `[B, S, G, kv_rank + rope]` with the logits of the heads' own; the keys' first
        channels are the latents."""
        q = jnp.einsum("btgrk,cgrk->btgrc", self._grouped(q_nope), self._up(self.k_up)).reshape(*q_nope.shape[:3], -1)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*latents.shape[:3], k_rope.shape[-1]))
        return jnp.concatenate([q, q_rope], -1), jnp.concatenate([latents, shared], -1)

    def _from_latents(self, o: jax.Array) -> jax.Array:
        """The heads' outputs `[B, T, H, v_head_dim]` of mixed latents `[B, T, H, kv_rank]`."""
        return jnp.einsum("btgrc,cgrv->btgrv", self._grouped(o), self._up(self.v_up)).reshape(*o.shape[:3], -1)

    def _up(self, dense: Dense) -> jax.Array:
        """`[kv_rank, G, H / G, .]` in the compute dtype."""
        weight = dense.weight().astype(self.dtype)
        return weight.reshape(len(weight), self.config.num_latents, self.num_heads // self.config.num_latents, -1)

    def _grouped(self, heads: jax.Array) -> jax.Array:
        """`[B, T, H, .]` to `[B, T, G, H / G, .]`."""
        return heads.reshape(*heads.shape[:2], self.config.num_latents, -1, heads.shape[-1])

    def entries(self) -> dict[str, tuple[tuple[int, ...], str | None]]:
        """What the cache keeps of a token: shape, and the logical axis of its first dimension."""
        latents = ((self.config.num_latents, self.config.kv_rank), KV_HEADS)
        return {"latent": latents, "k_rope": ((self.config.rope_head_dim,), None)}

    def kept(self, new: MLAInputs | Latents) -> dict[str, jax.Array]:
        """What the cache keeps of new tokens."""
        return {"latent": new.latent, "k_rope": new.k_rope}

    def init_state(self, batch_size, max_len):
        return self.slots.empty(batch_size, max_len, self.entries(), self.dtype)

    def finish(self, o, inputs, x):
        gate = self.output_gate(x)
        return o if gate is None else o * gate

    def output_gate(self, x: jax.Array) -> jax.Array | None:
        """`[B, T, H, V or 1]`, or None."""
        return None if self.gate is None else jax.nn.sigmoid(split_heads(self.gate(x), self.num_heads))

    def output(self, o):
        return self.o(join_heads(o))

    def implied(self, inputs, rows, *, at):
        return attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs))

    def observe(self, inputs, x, *, at):
        options = {**self.options(inputs), "at": at}
        _, stats = attention(**self.operands(inputs, at), return_stats=True, **options)
        masses = {
            op.__name__: functools.partial(op, inputs.q, inputs.k, stats.lse, **options) for op in (first_masses, column_mass)
        }
        gate = self.output_gate(x)
        gates = {} if gate is None else {"output": GateValues(gate, 1.0)}
        found = {"attention": stats, "logits": (inputs.q, inputs.k, self.scale), **masses, "gates": gates}
        if (selected := options.pop("selected")) is not None:
            found["selection"] = Selection(selected, functools.partial(attention_rows, inputs.q, inputs.k, **options))
        return found

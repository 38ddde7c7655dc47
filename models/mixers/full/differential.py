"""What the differential transformers share: a head's weights are the difference of two softmaxes."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from plait.configs.domains import Channels, Epsilon, Heads
from plait.kernels import Tokens, attention, attention_rows
from plait.models.axes import KV_HEADS
from plait.models.build import Buffer, BuildContext
from plait.models.layers.norms import RMSNorm
from plait.models.mixers.base import HeadMixer
from plait.models.mixers.full.dot_product import DotProduct, GroupedConfig


class Pairs(NamedTuple):
    """What two maps of every head are made of."""

    q: jax.Array  # [B, T, 2H, K]
    k: jax.Array  # [B, S, Hkv or 2 Hkv, K]
    v: jax.Array  # [B, S, Hkv, V]
    weight: jax.Array  # [B, T, H or 1] float32, of the second map
    kv_at: Tokens | None = None


class Differential(DotProduct):
    """`A = A_1 - weight A_2`. Subclasses set `num_kv_heads` and `groups`.

    The op runs on 2H heads, which are laid out `[groups, 2, H / groups]`: the heads of a group, once for each map.
    """

    groups: int

    def halves(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        """The first and the second map of every head, of an axis of 2H."""
        x = x.reshape(*x.shape[:axis], self.groups, 2, -1, *x.shape[axis + 1 :])
        merge = lambda y: y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
        first, second = (merge(jax.lax.index_in_dim(x, i, axis + 1, keepdims=False)) for i in range(2))
        return first, second

    def paired(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """One axis of heads from those of both maps, `[B, T, heads, K]` each."""
        both = (y.reshape(*y.shape[:2], self.groups, -1, y.shape[3]) for y in (first, second))
        return jnp.stack(list(both), axis=3).reshape(*first.shape[:2], -1, first.shape[3])

    def weigh(self, inputs, *, at):
        v = jnp.repeat(inputs.v, inputs.k.shape[2] // inputs.v.shape[2], axis=2)
        o: Any = attention(inputs.q, inputs.k, v, at=at, kv_at=inputs.kv_at, **self.options(inputs, at))
        first, second = self.halves(o, 2)
        return (first.astype(jnp.float32) - inputs.weight[..., None] * second.astype(jnp.float32)).astype(o.dtype)

    attend_active = HeadMixer.attend_active

    def implied(self, inputs, rows, *, at):
        maps = attention_rows(inputs.q, inputs.k, rows=rows, at=at, **self.options(inputs, at))
        first, second = self.halves(maps, 1)
        return first - jnp.moveaxis(inputs.weight[:, rows], 1, -1)[..., None] * second

    def observe(self, inputs, x, *, at):
        return {}  # statistics of softmax rows fit neither map alone; probes look at rows of the difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeightedConfig(GroupedConfig):
    """Whose second maps have one learned weight a layer, and whose values are twice as wide as its keys."""

    num_heads: Heads | None = None
    """Heads, each of two maps; None gives d_model / (2 head_dim), half of what plain attention has."""
    head_dim: Channels = 64
    """Channels of a query and a key of one map; values have twice as many."""
    norm_eps: Epsilon = 1e-5
    """Epsilon of the per-head output norm."""
    norm_scale: bool = True
    """A learned gain of that norm; DiffLlama has none."""

    def count_heads(self, d_model: int) -> int:
        if self.num_heads is None and d_model % (2 * self.head_dim):
            raise ValueError(
                f"head_dim={self.head_dim} must divide d_model / 2 = {d_model / 2:g} when num_heads is None; set num_heads or a divisor"
            )
        return self.num_heads or d_model // (2 * self.head_dim)

    def maps(self, d_model: int) -> tuple[int, int, int]:
        return 2 * self.count_heads(d_model), self.head_dim, 2 * self.head_dim


class LayerWeighted(Differential):
    """Subclasses make their queries and keys in `both`.

    weight = exp(a_1 . b_1) - exp(a_2 . b_2) + w(l), w(l) = 0.8 - 0.6 exp(-0.3 l) in layer l from 0 on; what a head gives is
    normalised and multiplied by 1 - w(l), which keeps its gradients at the scale of plain attention.
    """

    def __init__(self, config: LayerWeightedConfig, d_model: int, ctx: BuildContext):
        super().__init__(config, d_model, ctx)
        _, self.num_kv_heads = config.heads(d_model)
        self.groups, value_dim = self.num_kv_heads, 2 * config.head_dim
        self.v = self.projection(ctx, d_model, self.num_kv_heads, value_dim, KV_HEADS)
        self.o = self.projection_back(ctx, d_model, value_dim)
        self.vectors = ctx.param(jax.nn.initializers.normal(0.1), (2, 2, config.head_dim), (None, None, None))
        self.start = Buffer(0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(ctx.layer_index, jnp.float32)), axes=())
        self.norm = RMSNorm(ctx, value_dim, eps=config.norm_eps, with_scale=config.norm_scale)

    @abc.abstractmethod
    def both(self, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Queries `[B, T, H, K]` of the first and of the second map, and keys `[B, T, Hkv, K]`."""

    def weight(self) -> jax.Array:
        """Of the second maps, a float32 number."""
        a, b = self.vectors[...].astype(jnp.float32).swapaxes(0, 1)
        first, second = jnp.exp((a * b).sum(-1))
        return first - second + self.start[...]

    def project(self, x, *, at, state):
        q, k = (self.turned(self.paired(*maps), at) for maps in self.both(self.placed(x, at)))
        v = self.split(self.v(x), self.num_kv_heads, KV_HEADS)
        return Pairs(q, k, v, jnp.broadcast_to(self.weight(), (*x.shape[:2], 1))), state

    def entries(self):
        heads, channels = self.num_kv_heads, self.config.head_dim
        return {"k": ((2 * heads, channels), KV_HEADS), "v": ((heads, 2 * channels), KV_HEADS)}

    def finish(self, o, inputs, x):
        return (self.norm(o).astype(jnp.float32) * (1 - self.start[...])).astype(o.dtype)

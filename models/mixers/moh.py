"""Mixture-of-Head attention: each token weighs shared heads and its own top-k of the routed ones. Wraps any multi-head mixer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.models.axes import EMBED
from plait.models.build import BuildContext
from plait.models.linear import Dense
from plait.models.mixers.base import HeadMixer, MixerConfig, register
from plait.models.mixers.full.softmax import SoftmaxConfig


@register("moh", kind=None, source="MoH: Multi-Head Attention as Mixture-of-Head Attention (2410.11842)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoHConfig(MixerConfig):
    """`o = sum_h g_h H_h W_O^h` with two-stage gates g: shared heads always on, top-k of the routed heads per token.

    With r = softmax(x W_r) over routed heads, s = softmax(x W_s) over shared ones and (a_1, a_2) = 2 softmax(x W_h):
    g_shared = a_1 h_s s, g_routed = a_2 k r / (sum of kept r) for the kept heads, 0 for the others.
    """

    mixer: MixerConfig = SoftmaxConfig()  # noqa: RUF009 (frozen)
    """The wrapped mixer."""
    num_shared_heads: int = 1
    """Leading heads that every token uses (0: all heads are routed)."""
    top_k: int | None = None
    """Routed heads a token uses; None gives half of them, rounded up."""
    balance: float = 0.01
    """Coefficient of the load-balance loss, averaged over the MoH layers."""

    def __post_init__(self) -> None:
        path = f"model.mixers.moh+{self.mixer.name}"
        if isinstance(self.mixer, MoHConfig):
            raise ValueError(f"{path}.mixer is itself a mixture of heads; wrap a mixer once")
        if self.num_shared_heads < 0 or self.balance < 0:
            raise ValueError(f"{path}: num_shared_heads={self.num_shared_heads} and balance={self.balance} must be 0 or more")

    @classmethod
    def example(cls) -> MoHConfig:
        return cls(mixer=SoftmaxConfig.example(), num_shared_heads=2)

    @property
    def kind(self):  # type: ignore[override]
        """That of the wrapped mixer."""
        return self.mixer.kind

    def split(self, num_heads: int) -> tuple[int, int]:
        """`(routed heads, routed heads per token)` out of `num_heads`. Raises ValueError where the options do not fit."""
        path = f"model.mixers.moh+{self.mixer.name}"
        routed = num_heads - self.num_shared_heads
        if routed < 1:
            raise ValueError(
                f"{path}.num_shared_heads={self.num_shared_heads} must leave a head of {num_heads}; use at most {num_heads - 1}"
            )
        top_k = self.top_k if self.top_k is not None else -(-routed // 2)
        if not 1 <= top_k <= routed:
            raise ValueError(f"{path}.top_k={top_k} must be between 1 and the {routed} routed heads")
        return routed, top_k

    def build(self, d_model: int, ctx: BuildContext) -> MoH:
        return MoH(self, d_model, ctx)

    def mixing_flops(self, d_model: int, seq_len: int) -> float:
        return self.mixer.mixing_flops(d_model, seq_len)


class MoH(HeadMixer):
    """See `MoHConfig`. Everything but the gates is the wrapped mixer's."""

    def __init__(self, config: MoHConfig, d_model: int, ctx: BuildContext):
        inner = config.mixer.build(d_model, ctx)
        if not isinstance(inner, HeadMixer):
            raise ValueError(
                f"model.mixers.moh+{config.mixer.name}: {config.mixer.name} has no head outputs to route; wrap a multi-head mixer"
            )
        self.config, self.inner, self.num_heads = config, inner, inner.num_heads
        self.num_routed, self.top_k = config.split(self.num_heads)
        shared = config.num_shared_heads
        self.routed_router = Dense(ctx, d_model, self.num_routed, (EMBED, None))
        self.shared_router = Dense(ctx, d_model, shared, (EMBED, None)) if shared > 1 else None
        self.balance_router = Dense(ctx, d_model, 2, (EMBED, None)) if shared else None

    def routing(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities of the routed heads and the 0/1 choice of exactly `top_k` of them, both `[B, T, num_routed]` float32."""
        p = jax.nn.softmax(self.routed_router(x).astype(jnp.float32), axis=-1)
        return p, (_rank(p) < self.top_k).astype(jnp.float32)

    def mix(self, inputs, x, *, segment_ids, positions):
        _, chosen = self.routing(x)
        shared = jnp.ones((*x.shape[:-1], self.num_heads - self.num_routed), bool)
        active = jnp.concatenate([shared, chosen > 0], axis=-1)
        return self.inner.attend_active(inputs, active, segment_ids=segment_ids, positions=positions)

    def gates(self, x: jax.Array) -> jax.Array:
        """Head weights `[B, T, H]` float32; the mean weight of an active head is 1 under uniform routing."""
        p, mask = self.routing(x)
        routed = p * mask
        routed = routed * self.top_k / routed.sum(-1, keepdims=True)
        if self.balance_router is None:
            return routed
        shared = jnp.ones((*x.shape[:-1], 1), jnp.float32)
        if self.shared_router is not None:
            shared = jax.nn.softmax(self.shared_router(x).astype(jnp.float32), axis=-1) * self.config.num_shared_heads
        both = 2 * jax.nn.softmax(self.balance_router(x).astype(jnp.float32), axis=-1)
        return jnp.concatenate([both[..., :1] * shared, both[..., 1:] * routed], axis=-1)

    def finish(self, o, x):
        return self.inner.finish(o, x) * self.gates(x)[..., None].astype(o.dtype)

    def loads(self, x: jax.Array, *, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean probability of each routed head and the share of tokens that use it, `[num_routed]`, padding left out."""
        real = (segment_ids > 0).astype(jnp.float32)[..., None]
        p, mask = ((y * real).sum((0, 1)) / jnp.maximum(real.sum(), 1.0) for y in self.routing(x))
        return p, mask

    def auxiliary_loss(self, x, *, segment_ids):
        """`E sum_e mean_t(p_e) mean_t(m_e)`, whose balanced value is top_k, times the coefficient."""
        p, mask = self.loads(x, segment_ids=segment_ids)
        return self.config.balance * self.num_routed * (p * mask).sum()

    def observe(self, inputs, x, *, segment_ids, positions):
        _, mask = self.loads(x, segment_ids=segment_ids)
        load = jnp.concatenate([jnp.ones(self.num_heads - self.num_routed), mask])
        return {**self.inner.observe(inputs, x, segment_ids=segment_ids, positions=positions), "head_load": load}

    def project(self, x, *, segment_ids, positions, state):
        return self.inner.project(x, segment_ids=segment_ids, positions=positions, state=state)

    def attend(self, inputs, *, segment_ids, positions, state):
        return self.inner.attend(inputs, segment_ids=segment_ids, positions=positions, state=state)

    def attend_step(self, inputs, *, positions, state):
        return self.inner.attend_step(inputs, positions=positions, state=state)

    def implied(self, inputs, rows, *, segment_ids, positions):
        return self.inner.implied(inputs, rows, segment_ids=segment_ids, positions=positions)

    def output(self, o):
        return self.inner.output(o)

    def init_state(self, batch_size, max_len):
        return self.inner.init_state(batch_size, max_len)


def _rank(p: jax.Array) -> jax.Array:
    """How many entries of the last axis come before each, largest first and equal ones in order; unlike a sort, it is no obstacle to
    sharding the other axes."""
    earlier = np.tri(p.shape[-1], k=-1, dtype=bool).reshape(*[1] * (p.ndim - 1), p.shape[-1], p.shape[-1])
    one, other = p[..., :, None], p[..., None, :]
    return ((other > one) | ((other == one) & earlier)).sum(-1)

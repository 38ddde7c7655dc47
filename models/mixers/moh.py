"""Mixture-of-Head attention: each token weighs shared heads and its own top-k of the routed ones. Wraps any multi-head mixer.

Its forerunner, the mixture of h - 1 heads, is an option.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from plait.configs.domains import Heads, SomeCoefficient, SomeHeads
from plait.kernels import Tokens
from plait.models.axes import EMBED
from plait.models.build import BuildContext
from plait.models.layers.linear import Dense
from plait.models.mixers.around import AroundHeads
from plait.models.mixers.base import HeadMixer, MixerConfig, WrapperConfig, abstract, register
from plait.models.mixers.full.softmax import SoftmaxConfig

_SMALL = 1e-12
"""Keeps gradients finite where queries are zero or alike."""


@register(
    "moh",
    source="MoH: Multi-Head Attention as Mixture-of-Head Attention (2410.11842); A Mixture of h - 1 Heads (2005.06537)",
    proof="the authors' routing by hand; the sum over experts",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoHConfig(WrapperConfig):
    """`o = sum_h g_h H_h W_O^h` with two-stage gates g: shared heads always on, top-k of the routed heads per token.

    With r = softmax(x W_r) over routed heads, s = softmax(x W_s) over shared ones and (a_1, a_2) = 2 softmax(x W_h):
    g_shared = a_1 h_s s, g_routed = a_2 k r / (sum of kept r) for the kept heads, 0 for the others.

    With `experts = "all_but_one"` the experts are the layers with one head left out, h / (h - 1) times the sum of the others, and
    p = softmax(x W) weighs them: `g_h = h / (h - 1) (1 - p_h)`, which averages 1 too. The paper's gates see the mean of the sequence,
    which a causal model has not: here each token has its own. It trains gates and experts in turns, one drawn expert at a time (block
    coordinate descent), which is the trainer's to do; here both are trained at once.

    With `router = "query_norm"` there is no router: r = softmax(|q_h| / std |q|) over routed heads, and gates are 1 or 0, through which
    the gradient of r goes straight. A softmax layer whose heads are all kept is then as it was, which is how MoH goes on from one.
    """

    mixer: MixerConfig = SoftmaxConfig()
    """The wrapped mixer."""
    experts: Literal["heads", "all_but_one"] = "heads"
    """What is mixed: shared heads and the top-k of the routed ones (MoH), or all layers with one head left out (MAE)."""
    num_shared_heads: SomeHeads = 1
    """Leading heads that every token uses (0: all heads are routed)."""
    top_k: Heads | None = None
    """Routed heads a token uses; None gives half of them, rounded up."""
    router: Literal["learned", "query_norm"] = "learned"
    """What weighs heads: learned projections of the token, or the norms of the softmax layer's queries (to go on from one without MoH)."""
    balance: SomeCoefficient = 0.01
    """Coefficient of the load-balance loss, averaged over the MoH layers."""

    def check(self) -> None:
        if isinstance(self.mixer, WrapperConfig):
            raise ValueError(f"mixer={self.mixer.name} is itself around a mixer; wrap a mixer once")
        if self.router == "query_norm" and not isinstance(self.mixer, SoftmaxConfig):
            raise ValueError(
                f"router='query_norm' needs the queries of softmax attention, and mixer={self.mixer.name} is another; use 'learned'"
            )
        plain = {"num_shared_heads": 1, "top_k": None, "router": "learned", "balance": 0.01}
        for name, default in plain.items():
            if self.experts == "all_but_one" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} chooses heads, of which experts='all_but_one' uses all; leave one of them out"
                )

    @classmethod
    def example(cls) -> MoHConfig:
        return cls(mixer=SoftmaxConfig.example(), num_shared_heads=2)

    def split(self, num_heads: int) -> tuple[int, int]:
        """`(routed heads, routed heads per token)` out of `num_heads`. Raises ValueError where the options do not fit."""
        if self.experts == "all_but_one":
            return num_heads, num_heads
        routed = num_heads - self.num_shared_heads
        if routed < 1:
            raise ValueError(
                f"num_shared_heads={self.num_shared_heads} must leave a head of {num_heads}; use at most {num_heads - 1}"
            )
        top_k = self.top_k if self.top_k is not None else -(-routed // 2)
        if top_k > routed:
            raise ValueError(f"top_k={top_k} must be at most the {routed} routed heads; use {routed} or less")
        if self.router == "query_norm" and routed < 3:
            raise ValueError(
                f"num_shared_heads={self.num_shared_heads} must leave three heads of {num_heads}, since router='query_norm' divides by "
                f"the deviation of their queries, and two always differ by as much; use at most {num_heads - 3}, or router='learned'"
            )
        return routed, top_k

    def fit(self, d_model: int) -> None:
        super().fit(d_model)
        abstract(self, d_model)  # raises where heads and options do not fit

    def build(self, d_model: int, ctx: BuildContext) -> MoH:
        return MoH(self, d_model, ctx)


class MoH(AroundHeads):
    """See `MoHConfig`. Everything but the gates is the wrapped mixer's."""

    def __init__(self, config: MoHConfig, d_model: int, ctx: BuildContext):
        inner = config.mixer.build(d_model, ctx)
        if not isinstance(inner, HeadMixer):
            raise ValueError(f"mixer={config.mixer.name} has no head outputs to route; wrap a multi-head mixer")
        if inner.num_heads < 2:
            raise ValueError(f"mixer={config.mixer.name} has one head, which leaves nothing to choose; wrap a mixer with more")
        self.config, self.inner, self.num_heads = config, inner, inner.num_heads
        self.num_routed, self.top_k = config.split(self.num_heads)
        shared = self.num_heads - self.num_routed

        def router(width: int) -> Dense:
            return Dense(ctx, d_model, width, (EMBED, None), role="router")

        learned = config.router == "learned"
        self.routed_router = router(self.num_routed) if learned else None
        self.shared_router = router(shared) if learned and shared > 1 else None
        self.balance_router = router(2) if learned and shared else None

    def routing(self, x: jax.Array, inputs: Any = None) -> tuple[jax.Array, jax.Array]:
        """Probabilities of the routed heads and the 0/1 choice of exactly `top_k` of them, both `[B, T, num_routed]` float32; `inputs` are
        the wrapped mixer's, where its queries choose."""
        scores = _query_norms(inputs.q[:, :, -self.num_routed :]) if self.routed_router is None else self.routed_router(x)
        p = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        return p, (_rank(p) < self.top_k).astype(jnp.float32)

    def mix(self, inputs, x, *, at):
        if self.config.experts == "all_but_one":
            return self.inner.mix(inputs, x, at=at)
        _, chosen = self.routing(x, inputs)
        shared = jnp.ones((*x.shape[:-1], self.num_heads - self.num_routed), bool)
        active = jnp.concatenate([shared, chosen > 0], axis=-1)
        return self.inner.attend_active(inputs, active, at=at)

    def gates(self, x: jax.Array, inputs: Any = None) -> jax.Array:
        """Head weights `[B, T, H]` float32; the mean weight of an active head is 1 under uniform routing."""
        p, mask = self.routing(x, inputs)
        if self.config.experts == "all_but_one":
            return self.num_heads / (self.num_heads - 1) * (1 - p)
        routed = p * mask
        if self.config.router == "query_norm":
            straight = mask + (routed - jax.lax.stop_gradient(routed))
            return jnp.concatenate([jnp.ones((*x.shape[:-1], self.num_heads - self.num_routed)), straight], axis=-1)
        routed = routed * self.top_k / routed.sum(-1, keepdims=True)
        if self.balance_router is None:
            return routed
        shared = jnp.ones((*x.shape[:-1], 1), jnp.float32)
        if self.shared_router is not None:
            shared = jax.nn.softmax(self.shared_router(x).astype(jnp.float32), axis=-1) * self.config.num_shared_heads
        both = 2 * jax.nn.softmax(self.balance_router(x).astype(jnp.float32), axis=-1)
        return jnp.concatenate([both[..., :1] * shared, both[..., 1:] * routed], axis=-1)

    def finish(self, o, inputs, x):
        return self.inner.finish(o, inputs, x) * self.gates(x, inputs)[..., None].astype(o.dtype)

    def loads(self, inputs: Any, x: jax.Array, *, at: Tokens) -> tuple[jax.Array, jax.Array]:
        """Mean probability of each routed head and the share of tokens that use it, `[num_routed]`, padding left out."""
        real = (at.segment_ids > 0).astype(jnp.float32)[..., None]
        p, mask = ((y * real).sum((0, 1)) / jnp.maximum(real.sum(), 1.0) for y in self.routing(x, inputs))
        return p, mask

    def auxiliary_losses(self, inputs, x, *, at):
        """Those of the inner mixer and `E sum_e mean_t(p_e) mean_t(m_e)`, whose balanced value is top_k, times the coefficient."""
        inner = self.inner.auxiliary_losses(inputs, x, at=at)
        if self.config.experts == "all_but_one":
            return inner
        p, mask = self.loads(inputs, x, at=at)
        return {**inner, "balance/moh": self.config.balance * self.num_routed * (p * mask).sum()}

    def observe(self, inputs, x, *, at):
        _, mask = self.loads(inputs, x, at=at)
        load = jnp.concatenate([jnp.ones(self.num_heads - self.num_routed), mask])
        return {**self.inner.observe(inputs, x, at=at), "load": load, "routed_load": mask}


def _query_norms(q: jax.Array) -> jax.Array:
    """`[B, T, H]` float32: norms of queries `[B, T, H, K]` over their deviation among the heads of a token."""
    norms = jnp.sqrt(jnp.square(q.astype(jnp.float32)).sum(-1) + _SMALL)
    spread = jnp.square(norms - norms.mean(-1, keepdims=True)).sum(-1, keepdims=True) / (norms.shape[-1] - 1)
    return norms * jax.lax.rsqrt(spread + _SMALL)


def _rank(p: jax.Array) -> jax.Array:
    """How many entries of the last axis come before each, largest first and equal ones in order; unlike a sort, it is no obstacle to
    sharding the other axes."""
    earlier = np.tri(p.shape[-1], k=-1, dtype=bool).reshape(*[1] * (p.ndim - 1), p.shape[-1], p.shape[-1])
    one, other = p[..., :, None], p[..., None, :]
    return ((other > one) | ((other == one) & earlier)).sum(-1)

"""Spectral norms of projections, and the least entropy that they allow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.reflections import lower_triangle
from plait.models.axes import EMBED
from plait.models.layers.linear import dense_layers, spectral_norm
from plait.models.looks.look import LogitMap
from plait.train.probes.base import Probe, register
from plait.train.probes.means import longest, masked_mean
from plait.train.probes.statistic import Metric, Panel, Statistic

_SECTION = "Spectral norms"


@register("spectral", source="sigmaReparam (2303.06296), sections 3.1 and 3.2 with theorem 3.1")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectral(Probe):
    """Largest singular values of the mixer's projections, sigmaReparam and adapters with them, and what follows for entropy."""

    by_default = False
    title = "Spectral norms"
    statistics = (
        Statistic(
            name="spectral_norm",
            per="layer",
            unit="singular value",
            meaning="largest singular value among the mixer's projections that do not lead back to the residual stream: queries, keys, values, "
            "gates, routers",
            metric=Metric(name="attn/spectral_norm", reduce=np.nanmax, meaning="the largest of all layers"),
            panel=Panel(title="Projections in", section=_SECTION, lines=True, most=True, log=True),
        ),
        Statistic(
            name="spectral_norm_out",
            per="layer",
            unit="singular value",
            meaning="largest singular value among the mixer's projections back to the residual stream",
            panel=Panel(title="Projections out", section=_SECTION, lines=True, most=True, log=True),
        ),
        Statistic(
            name="logit_norm",
            per="head",
            unit="singular value",
            meaning="σ = ‖W_Q W_Kᵀ‖₂ of the head times the logits' scale; of ‖W_Q‖₂ ‖W_K‖₂, no less, where positions turn queries and keys",
            metric=Metric(name="attn/logit_norm", reduce=np.nanmax, meaning="the largest of all heads"),
            panel=Panel(title="Logit norm", section=_SECTION, lines=True, most=True, log=True),
        ),
        Statistic(
            name="entropy_bound",
            per="head",
            unit="nats",
            meaning="least entropy that σ and the input's norm ‖X Xᵀ‖₂ allow, mean over the queries of each sequence's longest document",
            panel=Panel(title="Entropy bound", section=_SECTION, lines=True, low_is_dark=True),
        ),
        Statistic(
            name="entropy_bounded",
            per="head",
            unit="nats",
            meaning="entropy of the same queries: never below the bound",
            panel=Panel(title="Their entropy", section=_SECTION, lines=True, low_is_dark=True, compared=False),
        ),
    )

    def measure(self, look, config):
        if look.mixer is None:
            return {}
        into: list[jax.Array] = []
        out: list[jax.Array] = []
        for _, layer in dense_layers(look.mixer):
            back = layer.kernel.get_metadata()["axes"][-1] == EMBED
            (out if back else into).append(spectral_norm(jax.lax.stop_gradient(layer.weight())).max())
        norms = {name: jnp.stack(found).max() for name, found in (("spectral_norm", into), ("spectral_norm_out", out)) if found}
        form, exact = look.observed.get("logit_map"), look.observed.get("attention")
        if form is None or exact is None:
            return norms
        sigma = logit_norm(form)
        start, length = longest(look.at)
        inside = jnp.arange(look.x.shape[1])[None] - start[:, None]
        inside = (inside >= 0) & (inside < length[:, None])
        x = jnp.where(inside[..., None], look.x.astype(jnp.float32), 0.0)
        largest = jnp.square(spectral_norm(x))[:, None] * sigma[None]  # [B, H]
        seen = (look.at.positions + 1 if form.causal else length[:, None] + 0 * look.at.positions)[..., None]
        mean = lambda values: masked_mean(values, inside[..., None], axis=(0, 1))
        return {
            **norms,
            "logit_norm": sigma,
            "entropy_bound": mean(least_entropy(largest[:, None], seen)),
            "entropy_bounded": mean(exact.entropy),
        }


def logit_norm(form: LogitMap) -> jax.Array:
    """What bounds the norm of a head's logits over those of the inputs, `[H]` float32."""
    q, k = (jnp.moveaxis(w, 1, 0).astype(jnp.float32) for w in jax.lax.stop_gradient((form.q, form.k)))  # [H, D, K], [Hkv, D, K]
    group = q.shape[0] // k.shape[0]
    if form.turned:
        return form.scale * spectral_norm(q) * jnp.repeat(spectral_norm(k), group)
    sizes = lower_triangle(jnp.swapaxes(k, 1, 2))  # of keys in each direction of the head
    return form.scale * spectral_norm(jnp.einsum("hdk,hkj->hdj", q, jnp.repeat(sizes, group, axis=0), precision="highest"))


def least_entropy(norm: jax.Array, tokens: jax.Array) -> jax.Array:
    """`log(1 + (T - 1) b) + s sqrt(T (T - 1)) b / (1 + (T - 1) b)` with `b = exp(-s sqrt(T / (T - 1)))`: the least entropy of a softmax
    of T logits whose norm is at most s, 0 of one logit. Source: sigmaReparam (2303.06296), theorem 3.1."""
    others = jnp.maximum(tokens - 1, 1).astype(jnp.float32)
    b = jnp.exp(-norm * jnp.sqrt((others + 1) / others))
    bound = jnp.log1p(others * b) + norm * jnp.sqrt((others + 1) * others) * b / (1 + others * b)
    return jnp.where(tokens > 1, bound, 0.0)

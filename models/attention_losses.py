"""Losses on what attention does, through the statistics that attention gives with its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from plait.configs.components import Config
from plait.configs.domains import Coefficient, Number
from plait.models.looks.look import Look

_SMALL = 1e-12
"""Keeps gradients finite where a head's output, or what all heads do, is zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLossConfig(Config):
    """Coefficients of losses on attention, each the mean over the layers that have what it is of. None leaves no trace of a loss.

    H is the entropy of a query's weights, n the number of its document's tokens up to it, m its weight on the document's first token;
    means are over the queries that see two tokens or more, and over heads.
    """

    path = "model.attention_loss"

    entropy_floor: Coefficient | None = None
    """Of mean max(0, floor - H / log n), which keeps entropy from collapsing (2303.06296) and leaves heads above the floor alone."""
    floor: Annotated[float, Number(above=0, least=1e-3, most=1)] = 0.1
    """Share of log n below which `entropy_floor` acts."""
    entropy: Coefficient | None = None
    """Of mean -H in nats: attention entropy maximisation (AEM, 2406.15303)."""
    sharpness: Coefficient | None = None
    """Of mean H in nats: attention sharpening, by entropy (2306.00946)."""
    head_diversity: Coefficient | None = None
    """Of the mean cosine of the outputs of any two heads at a token, itself among them (disagreement on outputs, 1810.10183)."""
    head_balance: Coefficient | None = None
    """Of the squared coefficient of variation, over heads, of the mean of 1 - m: a head does as much as it leaves the sink (2602.01203)."""
    document_ranking: Coefficient | None = None
    """Of mean -log of what right documents have of softmax(s / `temperature`), s being what the end of a query attends to in each document:
    the contrastive loss of BlockRank (2510.05396), in `blockrank` layers with an `answer_id`."""
    temperature: Annotated[float, Number(above=0, least=1e-3, most=1e3)] = 0.05
    """That of `document_ranking`."""

    def check(self) -> None:
        if self.floor != type(self).floor and self.entropy_floor is None:
            raise ValueError(f"floor={self.floor} is of entropy_floor, which is None; set entropy_floor, or leave floor out")
        if self.temperature != type(self).temperature and self.document_ranking is None:
            raise ValueError(
                f"temperature={self.temperature} is of document_ranking, which is None; set document_ranking, or leave temperature out"
            )

    @property
    def asked(self) -> dict[str, float]:
        """The coefficients of the losses that are there, by name."""
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        every = {name: value for name, value in every.items() if name not in ("floor", "temperature")}
        return {name: coefficient for name, coefficient in every.items() if coefficient is not None}


def attention_losses(looks: tuple[Look, ...], config: AttentionLossConfig) -> dict[str, jax.Array]:
    """The losses of a layer by name (`attention/entropy`), coefficients applied; the mean over the parts that have one."""
    each = [_of_part(one, config) for one in looks]
    found = {name: [part[name] for part in each if name in part] for name in config.asked}
    return {f"attention/{name}": config.asked[name] * jnp.stack(some).mean() for name, some in found.items() if some}


def _of_part(look: Look, config: AttentionLossConfig) -> Mapping[str, jax.Array]:
    real = look.at.segment_ids > 0
    sees = (real & (look.at.positions > 0))[:, :, None]  # [B, T, 1]
    found = {}
    if look.o is not None and look.o.shape[2] > 1:
        o = look.o.astype(jnp.float32)
        unit = o * jax.lax.rsqrt(jnp.square(o).sum(-1, keepdims=True) + _SMALL)
        found["head_diversity"] = _mean(jnp.square(unit.mean(2)).sum(-1, keepdims=True), real[:, :, None]).mean()
    if (exact := look.observed.get("attention")) is not None:
        ratio = exact.entropy / jnp.log(jnp.maximum(look.at.positions, 1).astype(jnp.float32) + 1)[:, :, None]
        active = _mean(1 - exact.first_mass, sees)
        found["entropy_floor"] = _mean(jax.nn.relu(config.floor - ratio), sees).mean()
        found["sharpness"] = _mean(exact.entropy, sees).mean()
        found["entropy"] = -found["sharpness"]
        found["head_balance"] = jnp.square(active - active.mean()).mean() / (jnp.square(active.mean()) + _SMALL)
    if (ranks := look.observed.get("document_ranks")) is not None:
        z = ranks.shares / config.temperature
        over = lambda which: jax.nn.logsumexp(jnp.where(which, z, -1e30), axis=-1)
        told = ranks.right.any(-1)
        loss = jnp.where(told, over(ranks.documents) - over(ranks.right), 0)
        found["document_ranking"] = loss.sum() / jnp.maximum(told.sum(), 1)
    return found


def _mean(values: jax.Array, seen: jax.Array) -> jax.Array:
    """Of each head, `[H]`, over the tokens of `[B, T, H]` that are seen; 0 where none is."""
    return jnp.where(seen, values, 0).sum((0, 1)) / jnp.maximum(seen.sum(), 1)

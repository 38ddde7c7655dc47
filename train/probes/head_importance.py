"""How much the loss would change without a head."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from plait.train.probes.base import GradientProbe, register
from plait.train.probes.means import by_document
from plait.train.probes.statistic import Panel, Statistic


@register("head_importance", source="Are Sixteen Heads Really Better than One? (1905.10650), section 4.1, per document here")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadImportance(GradientProbe):
    """Sensitivity of the loss to a mask of each head, from the gradients of its finished outputs."""

    by_default = False
    place, width = "heads", 2
    statistics = (
        Statistic(
            name="head_importance",
            per="head",
            unit="of a layer whose squares add up to 1",
            meaning="|Σₜ hₜ · ∂L/∂hₜ| of a document, h the head's output as it is projected, summed over documents, over the root of the sum "
            "of its squares in the layer; 1/√H where H heads matter alike",
            panel=Panel(title="Head importance", section="Heads", map=True, limits=(0, 1)),
        ),
    )

    def read(self, gradient, x, at):
        documents = at.numbered()
        product = (gradient.astype(jnp.float32) * x.astype(jnp.float32)).sum(-1)  # [B, T, H]
        importance = jnp.abs(by_document(product, documents)).sum((0, 1))
        return jnp.stack([importance, jnp.full(importance.shape, documents.max(1).sum(), jnp.float32)], axis=-1)

    def conclude(self, sums):
        importance, told = sums[:, 0], sums[:, 1] > 0
        size = jnp.linalg.norm(importance)
        return {"head_importance": jnp.where(told & (size > 0), importance / jnp.where(size > 0, size, 1.0), jnp.nan)}

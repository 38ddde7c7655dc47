"""The training loss: next-token cross-entropy, with what the model adds to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from plait.data.batch import Batch
from plait.kernels import cross_entropy
from plait.models.axes import EMBED, VOCAB, constrain
from plait.models.lm import LM
from plait.models.mixers.stats import ProbeConfig, Stats


def token_losses(model: LM, batch: Batch, probe: ProbeConfig | None = None) -> tuple[jax.Array, jax.Array, list[Stats | None]]:
    """Negative log-likelihood in nats and log-normaliser of each token, `[B, T]` float32 (0 off the loss mask), and the layers' statistics."""
    hidden, stats = model.hidden(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, probe=probe)
    weight = constrain(
        model.head_weight().astype(hidden.dtype), (EMBED, VOCAB)
    )  # where it lies is rounded, what is sent is small
    nll, lse = cross_entropy(hidden, weight, batch.targets, loss_mask=batch.loss_mask, logit_soft_cap=model.config.logit_soft_cap)
    return nll, lse, stats


def loss_terms(model: LM, batch: Batch, *, total: jax.Array, share: float, probe: ProbeConfig | None) -> tuple[jax.Array, dict]:
    """This micro-batch's part of the step's loss, and its named parts.

    Args:
        total: number of predicted tokens in the whole step, so that the parts of all micro-batches add up to the mean.
        share: this micro-batch's share of the step, for losses that are means over layers.
        probe: what the layers shall show, or None.

    Returns:
        The loss and `{"nll", "z", "auxiliary", "stats"}`; z-loss as arXiv 2204.02311 section 5.
    """
    nll, lse, stats = token_losses(model, batch, probe)
    mask = batch.loss_mask.astype(jnp.float32)
    parts = {"nll": (nll * mask).sum() / total, "z": jnp.zeros(()), "auxiliary": jnp.zeros(())}
    if model.config.z_loss is not None:
        parts["z"] = model.config.z_loss * (jnp.square(lse) * mask).sum() / total
    auxiliary = [s.auxiliary_loss for s in stats if s is not None and s.auxiliary_loss is not None]
    if auxiliary:
        parts["auxiliary"] = share * jnp.stack(auxiliary).mean()
    return parts["nll"] + parts["z"] + parts["auxiliary"], {**parts, "stats": stats if probe is not None else None}

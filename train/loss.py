"""The training loss: next-token cross-entropy, with what the model adds to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from plait.data.batch import Batch
from plait.kernels import Tokens, cross_entropy
from plait.models.axes import EMBED, VOCAB, constrain
from plait.models.block import Extras
from plait.models.lm import LM
from plait.models.looks.look import Observer


def tokens_of(batch: Batch) -> Tokens:
    """What is known of each position of a batch."""
    return Tokens(batch.tokens, batch.segment_ids, batch.positions)


def token_losses(
    model: LM, batch: Batch, observer: Observer | None = None, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, list[Extras]]:
    """Negative log-likelihood in nats and log-normaliser of each token, `[B, T]` float32 (0 off the loss mask), and the layers' extras."""
    at = dataclasses.replace(tokens_of(batch), noise=noise)
    if observer is not None:
        at = dataclasses.replace(at, predicted=batch.loss_mask > 0)
    hidden, extras = model.hidden(at, observer=observer)
    return *hidden_losses(model, hidden, batch), extras


def hidden_losses(model: LM, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The first two of `token_losses`, of what the head reads, `[B, T, D]`."""
    weight = constrain(
        model.head_weight().astype(hidden.dtype), (EMBED, VOCAB)
    )  # where it lies is rounded, what is sent is small
    return cross_entropy(hidden, weight, batch.targets, loss_mask=batch.loss_mask, logit_soft_cap=model.config.logit_soft_cap)


def loss_terms(
    model: LM,
    batch: Batch,
    *,
    total: jax.Array,
    share: float,
    observer: Observer | None,
    by_row: bool = False,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """This micro-batch's part of the step's loss, and its named parts.

    Args:
        total: number of predicted tokens in the whole step, so that the parts of all micro-batches add up to the mean.
        share: this micro-batch's share of the step, for losses that are means over layers.
        observer: to whom the layers show themselves, or None.
        noise: that of the tokens, uint32 `[B, T]`, where the model leaves something out at random.
        by_row: also gives `"rows"`: negative log-likelihood and number of predicted tokens of each row, float32 `[B, 2]`.

    Returns:
        The loss and `{"losses", "extras"}`: its parts by name, `train` for the cross-entropy alone, `z` (arXiv 2204.02311 section 5) and the
        layers' auxiliary losses, each the mean over the layers that have it.
    """
    nll, lse, extras = token_losses(model, batch, observer, noise)
    mask = batch.loss_mask.astype(jnp.float32)
    losses = {"train": (nll * mask).sum() / total}
    if model.config.z_loss is not None:
        losses["z"] = model.config.z_loss * (jnp.square(lse) * mask).sum() / total
    losses |= {name: share * loss for name, loss in auxiliary_losses(extras).items()}
    rows = {"rows": jnp.stack([(nll * mask).sum(1), mask.sum(1)], 1)} if by_row else {}
    return sum(losses.values()), {"losses": losses, "extras": extras, **rows}


def auxiliary_losses(extras: Sequence[Extras]) -> dict[str, jax.Array]:
    """The mean of each named loss over the layers that have it."""
    names = dict.fromkeys(name for one in extras for name in one.losses)
    return {name: jnp.stack([one.losses[name] for one in extras if name in one.losses]).mean() for name in names}

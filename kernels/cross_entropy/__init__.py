"""Next-token cross entropy that never holds the whole logits."""

import jax
import jax.numpy as jnp

from plait.kernels.cross_entropy import chunked, reference
from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.dispatch import Implementation, Op, kernel
from plait.kernels.shapes import check_rank, check_shape

__all__ = ["cross_entropy"]

Array = jax.Array

_op = Op(
    "cross_entropy",
    pallas_tpu=kernel("tpu", f"{__name__}.pallas_tpu", "cross_entropy"),
    pallas_gpu=kernel("gpu", f"{__name__}.pallas_gpu", "cross_entropy"),
    chunked=Implementation(chunked.cross_entropy),
    reference=Implementation(reference.cross_entropy),
)


def cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    *,
    loss_mask: Array | None = None,
    logit_soft_cap: float | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """The negative log likelihood of each target and the log normaliser of each row of logits; enough for loss and z-loss.

    z = cap(hidden @ weight),    lse = log sum_v exp z_v,    nll = lse - z_target,    cap(z) = c tanh(z / c) if there is one.

    Args:
      hidden: [B, T, D], float32 or bfloat16.
      weight: [D, Vocab].
      targets: int32 [B, T], in [0, Vocab) where the mask is set, anything elsewhere.
      loss_mask: [B, T], zero or False where both results and all gradients are zero; None counts every token.
      logit_soft_cap: c, above 0, or None.
      chunk_size: tokens of each sequence whose logits exist at a time; None takes what fits 128 MiB of float32, at least 64. The
        pallas implementations hold as many logit gradients, and no logits, of all tokens and some of the vocabulary.
      implementation: "auto", "pallas_tpu", "pallas_gpu", "chunked" or "reference".

    Returns:
      nll and lse, both float32 [B, T] in nats.

    Raises:
      ValueError: a shape or the cap does not fit, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the call.

    Source: chunking and recomputation as in Cut Your Losses, arXiv 2411.09009, over tokens only; z-loss of PaLM, 2204.02311.
    """
    op = "cross_entropy"
    check_rank(op, "hidden", hidden, "[B, T, D]")
    check_rank(op, "weight", weight, "[D, Vocab]")
    check_shape(op, "weight", weight, (hidden.shape[-1], weight.shape[1]), "[D, Vocab] with D of hidden")
    check_shape(op, "targets", targets, hidden.shape[:2], "[B, T]")
    loss_mask = jnp.ones(targets.shape, bool) if loss_mask is None else loss_mask
    check_shape(op, "loss_mask", loss_mask, targets.shape, "[B, T]")
    if logit_soft_cap is not None and logit_soft_cap <= 0:
        raise ValueError(f"{op}: logit_soft_cap={logit_soft_cap} must be above 0; use None for no cap")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size={chunk_size} must be at least 1; use None for the default")
    call = CrossEntropyCall(
        hidden=hidden,
        weight=weight,
        targets=targets,
        loss_mask=loss_mask != 0,
        logit_soft_cap=logit_soft_cap,
        chunk_size=chunk_size,
    )
    return _op(implementation, call)

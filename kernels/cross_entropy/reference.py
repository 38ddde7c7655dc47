"""Cross entropy as written, from all logits."""

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


def cross_entropy(
    hidden: Array, weight: Array, targets: Array, *, loss_mask: Array, logit_soft_cap: float | None, chunk_size: int | None
) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`; `chunk_size` means nothing here."""
    dtype = accumulation_dtype(hidden, weight)
    logits = jnp.einsum("btd,dv->btv", hidden.astype(dtype), weight.astype(dtype), precision="highest")
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.where(loss_mask, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(loss_mask, lse - target, 0), jnp.where(loss_mask, lse, 0)

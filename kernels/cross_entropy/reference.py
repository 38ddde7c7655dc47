"""Cross entropy as written, from all logits."""

import jax
import jax.numpy as jnp

from plait.kernels.cross_entropy.call import CrossEntropyCall
from plait.kernels.shapes import accumulation_dtype

Array = jax.Array


def cross_entropy(call: CrossEntropyCall) -> tuple[Array, Array]:
    """See `plait.kernels.cross_entropy`; `chunk_size` means nothing here."""
    hidden, weight, targets, loss_mask, soft_cap = call.hidden, call.weight, call.targets, call.loss_mask, call.logit_soft_cap
    dtype = accumulation_dtype(hidden, weight)
    logits = jnp.einsum("btd,dv->btv", hidden.astype(dtype), weight.astype(dtype), precision="highest")
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, jnp.where(loss_mask, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(loss_mask, lse - target, 0), jnp.where(loss_mask, lse, 0)

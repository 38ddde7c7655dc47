"""The convolution as a sum of shifted copies, which the compiler fuses into one pass."""

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.short_conv.call import ShortConvCall
from plait.kernels.short_conv.reference import first_id, last_inputs

Array = jax.Array


def short_conv(call: ShortConvCall) -> tuple[Array, Array]:
    """See `plait.kernels.short_conv`."""
    x, weight, bias, segment_ids, reach = call.x, call.weight, call.bias, call.segment_ids, call.reach
    dtype, length = accumulation_dtype(x, weight), x.shape[1]
    inputs = jnp.concatenate([call.before, x], axis=1)
    weight = weight.astype(dtype)
    y = x.astype(dtype) * weight[reach][None, None, :]
    if segment_ids is not None:
        ids = jnp.concatenate([jnp.repeat(first_id(segment_ids), reach, axis=1), segment_ids], axis=1)
    for tap in range(reach):
        shifted = inputs[:, tap : tap + length].astype(dtype) * weight[tap][None, None, :]
        if segment_ids is not None:
            shifted = jnp.where((ids[:, tap : tap + length] == segment_ids)[..., None], shifted, 0)
        y += shifted
    y = y if bias is None else y + bias.astype(dtype)[None, None, :]
    y = jax.nn.silu(y) if call.activation == "silu" else y
    if segment_ids is None:
        return y.astype(x.dtype), inputs[:, length:]
    return jnp.where((segment_ids != 0)[..., None], y, 0).astype(x.dtype), last_inputs(inputs, ids, reach)

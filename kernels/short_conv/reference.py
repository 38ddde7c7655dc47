"""The convolution as written: every output gathers its taps."""

import jax
import jax.numpy as jnp

from plait.kernels.shapes import accumulation_dtype
from plait.kernels.short_conv.call import ShortConvCall

Array = jax.Array


def short_conv(call: ShortConvCall) -> tuple[Array, Array]:
    """See `plait.kernels.short_conv`."""
    x, weight, bias, segment_ids, reach = call.x, call.weight, call.bias, call.segment_ids, call.reach
    dtype, (batch, length, _) = accumulation_dtype(x, weight), x.shape
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    inputs = jnp.concatenate([call.before, x], axis=1)
    ids = jnp.concatenate([jnp.repeat(first_id(ids), reach, axis=1), ids], axis=1)
    taps = jnp.arange(length)[:, None] + jnp.arange(reach + 1)[None, :]  # [T, W]: taps[t, -1] is token t
    same = (ids[:, taps] == ids[:, taps[:, -1:]]) & (ids[:, taps] != 0)  # [B, T, W]
    gathered = jnp.where(same[..., None], inputs[:, taps], 0).astype(dtype)
    y = jnp.einsum("btwd,wd->btd", gathered, weight.astype(dtype), precision="highest")
    y = y if bias is None else y + bias.astype(dtype)[None, None, :]
    y = jax.nn.silu(y) if call.activation == "silu" else y
    y = jnp.where((ids[:, reach:] != 0)[..., None], y, 0)
    return y.astype(x.dtype), last_inputs(inputs, ids, reach)


def first_id(ids: Array) -> Array:
    """The id [B, 1] of the first token that is not padding; 0 when there is none."""
    return jnp.take_along_axis(ids, jnp.argmax(ids != 0, axis=1)[:, None], axis=1)


def last_inputs(inputs: Array, ids: Array, reach: int) -> Array:
    """The last `reach` entries [B, W-1, D] up to the last token that is not padding, zero where they are of another segment.

    `inputs` and `ids` begin with the entries of the initial state, which are kept as they are when no token is real.
    """
    length = ids.shape[1] - reach
    real = ids[:, reach:] != 0
    last = jnp.max(jnp.where(real, jnp.arange(1, length + 1)[None, :], 0), axis=1)  # [B], tokens up to the last real one
    window = last[:, None] + jnp.arange(reach)[None, :]  # [B, W-1] into inputs
    ids_there = jnp.take_along_axis(ids, window, axis=1)
    keep = (ids_there == jnp.take_along_axis(ids, (last + reach - 1)[:, None], axis=1)) | (last == 0)[:, None]
    return jnp.where(keep[..., None], jnp.take_along_axis(inputs, window[..., None], axis=1), 0)

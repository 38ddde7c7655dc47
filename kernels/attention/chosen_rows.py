"""At which rows of the keys the tokens stand that each query chooses one by one, for kernels that gather them."""

import jax
import jax.numpy as jnp

from plait.kernels.attention.call import AttentionCall
from plait.kernels.attention.visits import laid_out, segment_starts

Array = jax.Array


def chosen_rows(call: AttentionCall, *, padding: bool = True) -> Array:
    """int32 [B, T, Hs, N]: the rows of k that a query sees of those in `call.selected`, in its order; -1 for what it does not see.

    A row is seen if it holds the token that was chosen, of the query's segment, and the mask shows it; padding sees nothing. The call
    selects tokens (`selected.block_size` is 1), of keys that are tokens of the queries' documents (`document_keys`).

    Args:
      padding: hide padding between the tokens of a segment. Without, no segment is looked up under a causal mask, which hides others.
    """
    selected = call.selected
    layout, queries, keys = laid_out(call)
    index = selected.indices
    one_head = lambda tokens: jax.tree.map(lambda x: x[:, None], tokens)
    starts = segment_starts(layout, one_head(queries), one_head(keys), selected)
    at = lambda x: x[:, :, None, None]  # of each query, [B or 1, T, 1, 1]
    rows = at(starts) + index
    seen = (index >= 0) & (index < selected.num_blocks) & (rows >= 0) & (rows < layout.num_keys)
    seen &= call.mask.reaches(at(queries.positions), index)
    seen &= at(queries.segment_ids) != 0
    if layout.packed and (padding or not call.mask.causal):
        inside = jnp.clip(rows, 0, layout.num_keys - 1).reshape(rows.shape[0], -1)
        there = lambda x: jnp.take_along_axis(jnp.broadcast_to(x, (rows.shape[0], x.shape[1])), inside, axis=1)
        ids, positions = (there(x).reshape(rows.shape) for x in (keys.segment_ids, keys.positions))
        seen &= (ids == at(queries.segment_ids)) & (ids != 0) & (positions == index)
    return jnp.where(seen, rows, -1)

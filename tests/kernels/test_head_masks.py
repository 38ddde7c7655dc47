"""Masks by head: every op of attention gives each head what it gives under that head's mask alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import (
    ChunkMask,
    DistanceBias,
    HeadMasks,
    LowRankBias,
    Mask,
    SelectedBlocks,
    Tokens,
    attention,
    attention_rows,
    column_mass,
    first_masses,
    routed_attention,
)
from plait.tests.kernels.cases import quick_jit
from plait.tests.suites import usually
from plait.tests.tolerances import assert_close

LENGTH, HEADS, KV_HEADS, DIM = 20, 6, 2, 4
WINDOW, CHUNK = Mask(window_size=3), ChunkMask(chunk_size=8, shift=4, kv_shift=4)
MASKS = (Mask(), WINDOW, WINDOW, CHUNK, WINDOW, Mask())
"""Of the three heads of a key head: two windows in the first, one in the second."""
KINDS = tuple(dict.fromkeys(MASKS))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


BIASES = {
    "none": None,
    "low rank": LowRankBias(random(2, LENGTH, HEADS, 3, seed=5), random(1, LENGTH, KV_HEADS, 3, seed=6)),
    "distance": DistanceBias(table=random(HEADS, 2, seed=7), slopes=random(HEADS, seed=8), edges=(4,)),
}


@pytest.mark.parametrize("bias", usually(BIASES, "none", "low rank"))
def test_every_head_has_its_own_mask(bias: str):
    ids = jnp.asarray(np.repeat([[0, 1, 2], [1, 2, 0]], (3, 7, 10), axis=1), jnp.int32)
    active = jnp.asarray(np.random.default_rng(9).random((2, LENGTH, HEADS)) < 0.5)
    indices = jnp.asarray(np.random.default_rng(4).integers(-1, 5, (2, LENGTH, HEADS // 2, 2)), jnp.int32)
    selected = SelectedBlocks(indices=indices, block_size=4, num_blocks=5) if bias == "none" else None

    @quick_jit
    def run(q, k, v, sinks):
        def ops(mask):
            named = {"mask": mask, "at": Tokens(None, ids), "bias": BIASES[bias]}
            some = named if selected is None else {**named, "selected": selected}
            o, stats = attention(q, k, v, return_stats=True, sinks=sinks, **some)
            sigmoid = {"normalizer": "sigmoid", "sigmoid_bias": sinks}
            return {
                "o": o,
                **stats._asdict(),
                "lse_alone": attention(q, k, v, return_lse=True, sinks=sinks, **some)[1],
                "routed": routed_attention(q, k, v, active, **named),
                "rows": jnp.swapaxes(attention_rows(q, k, rows=jnp.arange(3, 9), **some), 1, 2),
                "first": first_masses(q, k, stats.lse, first_k=2, **some),
                "column": column_mass(q, k, stats.lse, **some),
                "sigmoid": attention(q, k, v, **some, **sigmoid),
                "query_sinks": attention(q, k, v, sinks=q[..., 0], **some),
            }

        return ops(HeadMasks(MASKS)), [ops(mask) for mask in KINDS]

    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    got, alone = run(*(random(2, LENGTH, *shape, seed=i) for i, shape in enumerate(shapes)), random(HEADS, seed=3))
    for name, values in got.items():
        for head, mask in enumerate(MASKS):
            assert_close(values[:, :, head], alone[KINDS.index(mask)][name][:, :, head], err_msg=f"{name} of head {head}")


def test_heads_of_one_mask_are_one_group_where_key_heads_have_as_many():
    groups = [(group.heads, group.kv_heads) for group in HeadMasks(MASKS).groups(6)]
    assert groups == [((0, 5), (0, 5)), ((1, 2, 4), (1, 2, 4)), ((3,), (3,))]
    assert len(list(HeadMasks((WINDOW, WINDOW, CHUNK, CHUNK)).groups(2))) == 2
    assert {group.heads for group in HeadMasks(MASKS).groups(2)} == {(0, 5), (1, 2), (3,), (4,)}


def test_head_masks_that_do_not_fit_are_refused():
    q = random(1, 4, 2, 4)
    with pytest.raises(ValueError, match="attention: mask has 6 masks and q has H=2 heads; give one a head"):
        attention(q, q, q, mask=HeadMasks(MASKS))
    with pytest.raises(ValueError, match="must all look back, or all both ways"):
        HeadMasks((Mask(), Mask(causal=False)))

"""Block selection against its rule in plain Python, its causality, and its use as attention's table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, Tokens, attention, topk_blocks
from plait.kernels.topk_blocks import chunked
from plait.tests.kernels import loops
from plait.tests.tolerances import assert_close

BATCH, LENGTH, HEADS, KV_HEADS, DIM, BLOCK = 2, 90, 4, 2, 8, 8


def _inputs(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((BATCH, LENGTH, h, DIM)), jnp.float32) for h in (HEADS, KV_HEADS))


def _segments() -> np.ndarray:
    ids = np.ones((BATCH, LENGTH), np.int32)
    ids[0, 19:43], ids[0, 43:], ids[0, 85:] = 2, 3, 0
    ids[1, :13], ids[1, 50:57], ids[1, 57:] = 0, 0, 900
    return ids


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("block_q", "num_local", "num_first", "by_group", "packed"),
    [(1, 1, 0, False, True), (1, 2, 1, True, True), (4, 1, 1, False, False), (8, 2, 0, True, False)],
)
def test_selection_follows_the_rule(implementation, block_q, num_local, num_first, by_group, packed, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", 2000)
    options = {"top_k": 4, "block_q": block_q, "num_local": num_local, "num_first": num_first, "by_group": by_group}
    (q, k), ids = _inputs(), _segments() if packed else np.ones((BATCH, LENGTH), np.int32)
    table = topk_blocks(q, k, block_kv=BLOCK, at=Tokens(None, jnp.asarray(ids)), implementation=implementation, **options)
    assert (np.asarray(table.visible) == loops.topk_blocks(q, k, ids, block_kv=BLOCK, **options)).all()


@pytest.mark.parametrize("block_q", [1, 4])
def test_no_query_sees_its_future(block_q):
    (q, k), (q2, k2), t = _inputs(), _inputs(1), 50
    later = lambda a, b: jnp.concatenate([a[:, :t], b[:, t:]], axis=1)

    def run(q, k):
        table = topk_blocks(q, k, top_k=3, block_kv=BLOCK, block_q=block_q)
        return attention(q, k, k, mask=Mask(), block_table=table)

    assert (np.asarray(run(q, k))[:, :t] == np.asarray(run(later(q, q2), later(k, k2)))[:, :t]).all()


def test_all_blocks_are_dense_attention():
    q, k = _inputs()
    table = topk_blocks(q, k, top_k=12, block_kv=BLOCK, at=Tokens(None, jnp.asarray(_segments())))
    options = {"mask": Mask(), "at": Tokens(None, jnp.asarray(_segments()))}
    assert_close(attention(q, k, k, block_table=table, **options), attention(q, k, k, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1, "num_local": 2}, "top_k=1 must hold num_local=2"),
        ({"top_k": 2, "block_q": 3}, "block_q=3 must divide block_kv=8"),
    ],
)
def test_bad_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        topk_blocks(*_inputs(), block_kv=BLOCK, **options)

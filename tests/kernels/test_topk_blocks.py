"""Block selection against its rule in plain Python, its causality, its equality wherever a document stands, and attention over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, SelectedBlocks, Tokens, attention, topk_blocks, whole_blocks
from plait.kernels.topk_blocks import chunked
from plait.tests.kernels import loops
from plait.tests.kernels.cases import quick_jit
from plait.tests.tolerances import assert_close

BATCH, LENGTH, HEADS, KV_HEADS, DIM, BLOCK = 2, 90, 4, 2, 8, 8


def _inputs(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((BATCH, LENGTH, h, DIM)), jnp.float32) for h in (HEADS, KV_HEADS))


def _segments() -> np.ndarray:
    """Several documents, padding before, between, inside and after them, one shorter than a block."""
    ids = np.ones((BATCH, LENGTH), np.int32)
    ids[0, 19:43], ids[0, 43:], ids[0, 85:] = 2, 3, 0
    ids[0, [22, 26, 51, 60, 61]] = 0
    ids[1, :13], ids[1, 50:57], ids[1, 57:] = 0, 0, 900
    return ids


def _select(q: jax.Array, k: jax.Array, at: Tokens, block_size: int = BLOCK, **options) -> SelectedBlocks:
    at = at.placed(*q.shape[:2])
    blocks = whole_blocks(at, block_size)
    return topk_blocks(
        q, blocks.mean(k), blocks_at=blocks.at, at=at, block_size=block_size, num_blocks=-(-LENGTH // block_size), **options
    )


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("num_local", "num_first", "by_group", "scale", "packed"),
    [(1, 0, False, None, True), (2, 1, True, None, True), (1, 1, True, 0.4, True), (2, 0, False, 0.4, False)],
)
def test_selection_follows_the_rule(implementation, num_local, num_first, by_group, scale, packed, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_SCORES", 2000)
    options = {"top_k": 4, "num_local": num_local, "num_first": num_first, "by_group": by_group, "scale": scale}
    (q, k), ids = _inputs(), _segments() if packed else np.ones((BATCH, LENGTH), np.int32)
    select = quick_jit(lambda q, k, ids: _select(q, k, Tokens(None, ids), implementation=implementation, **options).indices)
    found = np.asarray(select(q, k, jnp.asarray(ids)))
    assert found.shape == (BATCH, LENGTH, KV_HEADS if by_group else HEADS, 4)
    expected = loops.topk_blocks(q, k, ids, block_size=BLOCK, **options)
    for b, t, h in np.ndindex(BATCH, LENGTH, HEADS):
        got = [n for n in found[b, t, h * found.shape[2] // HEADS] if n >= 0]
        assert set(got) == expected[b][t][h] and len(got) == len(set(got)), (b, t, h)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_tokens_by_a_lightning_indexer_are_those_of_its_scores(implementation, monkeypatch):
    """Packed and padded; of equal scores, as the many that are 0, the later; padding and the start of a document have fewer."""
    monkeypatch.setattr(chunked, "MAX_SCORES", 2000)
    random, ids, top_k = np.random.default_rng(2), _segments(), 6
    q, k, w = (random.normal(size=(BATCH, LENGTH, *rest)).astype(np.float32) for rest in ((2, DIM), (1, DIM), (2,)))
    at = Tokens(None, jnp.asarray(ids)).placed(BATCH, LENGTH)
    found = topk_blocks(
        *(jnp.asarray(x) for x in (q, k)),
        weights=jnp.asarray(w),
        blocks_at=at,
        at=at,
        top_k=top_k,
        block_size=1,
        num_blocks=LENGTH,
        num_local=0,
        by_group=True,
        implementation=implementation,
    )
    assert found.indices.shape == (BATCH, LENGTH, 1, top_k)
    scores = np.einsum("bth,bths->bts", w.astype(np.float64), np.maximum(np.einsum("bthk,bsk->bths", q, k[:, :, 0]), 0))
    zeros = 0
    for b, t in np.ndindex(BATCH, LENGTH):
        got = [n for n in np.asarray(found.indices)[b, t, 0] if n >= 0]
        visible = [s for s in range(t + 1) if ids[b, s] == ids[b, t] != 0]
        best = sorted(visible, key=lambda s: (scores[b, t, s] + 0.0, s), reverse=True)[:top_k]
        zeros += sum(scores[b, t, s] == 0 for s in best)
        assert sorted(got) == sorted(np.asarray(at.positions)[b, best].tolist()), (b, t)
    assert zeros > 20, "ties were to be seen"


def test_no_query_sees_its_future():
    (q, k), (q2, k2), t = _inputs(), _inputs(1), 50
    later = lambda a, b: jnp.concatenate([a[:, :t], b[:, t:]], axis=1)

    @quick_jit
    def run(q, k):
        return attention(q, k, k, mask=Mask(), selected=_select(q, k, Tokens(), top_k=3))

    assert (np.asarray(run(q, k))[:, :t] == np.asarray(run(later(q, q2), later(k, k2)))[:, :t]).all()


@pytest.mark.parametrize("shift", [0, 3, 17])
def test_a_document_selects_the_same_wherever_it_stands(shift):
    """Behind padding and behind another document."""
    (q, k), length = _inputs(), LENGTH - 17

    @quick_jit
    def run(q, k, at):
        return attention(q, k, k, mask=Mask(), at=at, selected=_select(q, k, at, top_k=3))

    alone = run(q[:, :length], k[:, :length], Tokens())
    for before in (0, 7):
        ids = np.zeros((BATCH, LENGTH), np.int32)
        ids[:, :shift], ids[:, shift : shift + length] = before, 2
        at = Tokens(None, jnp.asarray(ids)).placed(BATCH, LENGTH)
        o = run(*(jnp.asarray(np.roll(x, shift, axis=1)) for x in (q, k)), at)
        assert_close(np.asarray(o)[:, shift : shift + length], alone)


def test_tokens_one_by_one_from_a_cache_select_the_same():
    (q, k), size = _inputs(), BLOCK
    whole = np.asarray(quick_jit(lambda q, k: attention(q, k, k, mask=Mask(), selected=_select(q, k, Tokens(), top_k=3)))(q, k))
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))

    @quick_jit
    def answer(q, keys, at, cached):
        blocks = whole_blocks(cached, size)
        options = {"top_k": 3, "block_size": size, "num_blocks": -(-LENGTH // size)}
        selected = topk_blocks(q, blocks.mean(keys), blocks_at=blocks.at, at=at, **options)
        return attention(q, keys, keys, mask=Mask(), at=at, kv_at=cached, selected=selected)

    for t in (0, 7, 8, 41, LENGTH - 1):
        cached = Tokens(None, jnp.asarray(place <= t, jnp.int32), jnp.asarray(np.where(place <= t, place, -1)))
        at = Tokens(None, jnp.ones((BATCH, 1), jnp.int32), jnp.asarray(place[:, t : t + 1]))
        keys = jnp.asarray(np.where((place <= t)[..., None, None], k, 0))
        assert_close(answer(jnp.asarray(np.asarray(q)[:, t : t + 1]), keys, at, cached)[:, 0], whole[:, t])


def test_all_blocks_are_dense_attention():
    (q, k), at = _inputs(), Tokens(None, jnp.asarray(_segments()))

    @quick_jit
    def both(q, k):
        return tuple(attention(q, k, k, mask=Mask(), at=at, selected=one) for one in (_select(q, k, at, top_k=12), None))

    assert_close(*both(q, k))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1, "num_local": 2}, "top_k=1 must hold num_local=2"),
        ({"top_k": 2, "block_size": 0}, "block_size=0 must be at least 1"),
        ({"top_k": 2, "weights": jnp.ones((BATCH, LENGTH, HEADS))}, "by_group=False and scale=None with weights"),
        ({"top_k": 2, "num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"top_k": 2, "stride": 4}, "stride=4 and span=None are of one thing; give both"),
        ({"top_k": 2, "stride": 3, "span": 6}, "stride=3 must be at least 1 and divide span=6 and block_size=8"),
        (
            {"top_k": 2, "blocks_at": Tokens(None, *[jnp.ones((BATCH, 3), jnp.int32)] * 2)},
            r"blocks_at.segment_ids.shape=\(2, 3\) must be",
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    q, k = _inputs()
    blocks = whole_blocks(Tokens().placed(BATCH, LENGTH), BLOCK)
    with pytest.raises(ValueError, match=message):
        topk_blocks(q, blocks.mean(k), **{"blocks_at": blocks.at, "block_size": BLOCK, "num_blocks": 12} | options)

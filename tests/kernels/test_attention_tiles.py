"""What the TPU attention kernel is told to compute: edges of tiles, visited ones, sizes, cuts of selected blocks; no kernel runs."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import ChunkMask, GlobalMask, Mask, PowerMask, SelectedBlocks, Tokens
from plait.kernels.attention import pallas_tpu
from plait.kernels.attention.pallas_tpu import choose_tiles
from plait.kernels.attention.tpu import bands, edges, size, steps
from plait.kernels.attention.tpu.best_tiles import FLOAT32, SELECTED
from plait.kernels.attention.tpu.cut import Cut
from plait.kernels.attention.tpu.key_sums import RESERVE, resident_bytes
from plait.kernels.attention.tpu.tiling import Tile
from plait.kernels.attention.tpu.weights import _log_sigmoid
from plait.kernels.attention.visits import SKIP, Layout, tile_kinds
from plait.kernels.target import target
from plait.tests.tolerances import assert_close


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [256, 384])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False, window_size=300),
        Mask(window_size=513, num_sink_tokens=3),
        Mask(window_size=40, dilation=7),
        PowerMask(block_size=128, window_size=20),
        ChunkMask(chunk_size=300, shift=100),
        GlobalMask(window_size=9),
    ],
    ids=str,
)
def test_edges_hide_and_show_by_order(mask: Mask, block: int, packed: bool):
    length = 6 * block
    known = bands.banded_edges(Layout(mask, length, length, own_keys=True, packed=packed), block, block)
    plain, hidden, banded = mask.without_sinks(), 0, 0
    apart = np.arange(128) - np.arange(128)[:, None]
    starts = (0, 77, length // 2) if packed else (0,)  # where the second segment begins, or the only one
    for start in starts:
        at = jnp.arange(length) - start
        ids = 1 + (at >= 0).astype(jnp.int32)
        at = jnp.where(at < 0, at + start, at)
        visible = np.asarray(plain.dense(at, at, ids, ids)).reshape(6, block, 6, block).swapaxes(1, 2)
        inside = np.arange(6) * block >= start
        for i, j in np.argwhere(known.kinds >= edges.FIRST_EDGE):
            cells = visible[i, j].T.reshape(block // 128, 128, block // 128, 128).swapaxes(1, 2)
            of_one = inside[i] and inside[j]
            shown, several = known.shown((known.kinds if of_one else known.of_several)[i, j])
            of_band = {at: shown[at[0]][at[1]] for at in np.ndindex(cells.shape[:2])}
            of_band = {at: state for at, state in of_band.items() if isinstance(state, edges.Band)}
            states = np.array([[edges.PARTLY if isinstance(state, edges.Band) else state for state in row] for row in shown])
            hidden += (states == edges.HIDDEN).sum()
            banded += len(of_band)
            for at, band in of_band.items() if of_one else ():
                assert (cells[at] == ((band.low <= apart) & (apart <= band.high))).all(), "a band shows what order does not"
            assert not cells[states == edges.HIDDEN].any(), "a visible cell is not computed"
            assert several != of_one, "tiles of several segments are computed under the mask"
            assert several or cells[states == edges.WHOLLY].all(), "a hidden key is taken for visible"
    assert hidden or mask.alignment > 1 or mask.dilation
    assert banded or mask.dilation or isinstance(mask, ChunkMask | GlobalMask) or (packed and mask.alignment > 1)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(window_size=600),
        Mask(window_size=256, num_sink_tokens=3),
        PowerMask(block_size=256),
        ChunkMask(chunk_size=512),
    ],
    ids=str,
)
def test_kernels_have_every_kind_of_tile(mask: Mask):
    """A tile of a kind that a kernel was not made with would be left out."""
    for length, block, starts in itertools.product((2048, 2000), (256, 384), (None, (0,), (0, 512), (0, 300, 1900))):
        layout = Layout(mask, length, length, own_keys=True, packed=starts is not None)
        ids, at = np.zeros((2, 1, 1, -(-length // block) * block), np.int32)
        for number, start in enumerate(starts or (0,), 1):
            ids[..., start:length], at[..., start:length] = number, np.arange(length - start)
        tokens, known = Tokens(None, jnp.asarray(ids), jnp.asarray(at)), edges.edges(layout, block, block)
        kinds = tile_kinds(layout, tokens, tokens, block, block, keep_first=False, masked=(known.kinds, known.of_several))
        assert set(np.unique(kinds)) <= {SKIP, *known.possible}, (length, block, starts)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "by head"])
def test_steps_are_the_tiles_in_order(own: bool):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, (2, 3 if own else 1, 5, 2, 6)).astype(np.int32)
    kinds[0, :, 2] = 0
    kinds[1, 0] = 0
    found = steps.plan_steps(jnp.asarray(kinds), 60)
    table = np.asarray(found.entries).reshape(-1)
    assert int(found.longest) == max(np.maximum((kinds[b, h] > 0).sum((1, 2)), 1).sum() for b, h in np.ndindex(kinds.shape[:2]))
    for b, h in np.ndindex(kinds.shape[:2]):
        expected = []
        for i, tiles in enumerate(kinds[b, h]):
            visited = [(i, int(m), int(j), int(tiles[m, j])) for m, j in np.argwhere(tiles)] or [(i, 0, 0, 0)]
            expected += [(*tile, int(n == 0), int(n == len(visited) - 1)) for n, tile in enumerate(visited)]
        got = [tuple(map(int, found.read(table, b, h, n))) for n in range(int(found.longest))]
        assert got[: len(expected)] == expected
        assert all(tile == (*expected[-1][:3], SKIP, 0, 0) for tile in got[len(expected) :])


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_size_of_tiles_follows_the_mask(generation: str):
    layout = lambda mask, length=32768, packed=False: Layout(mask, length, length, own_keys=True, packed=packed)
    of_chip = choose_tiles(generation, 128, 128, jnp.bfloat16)

    def work(tile: Tile, window: int | None) -> float:
        return size.work(layout(Mask(window_size=window)), tile.block_q, tile.block_kv, step=tile.step)

    assert of_chip.sized(layout(Mask(), packed=True)) == of_chip
    assert (of_chip.sized(layout(Mask())) == of_chip) == (generation == "v5e"), "a step of v6e costs more"
    assert FLOAT32.sized(layout(Mask(causal=False))) == FLOAT32
    for window in (128, 1152, 2176, 4480):
        for kernel in ("forward", "gradients"):
            usual, best = (getattr(tiles, kernel) for tiles in (of_chip, of_chip.sized(layout(Mask(window_size=window)))))
            pairs = window * 32768 - window**2 / 2
            assert work(best, window) <= work(usual, window)
            if window > 1024:  # the promise is what full attention does, by density
                assert work(usual, None) * pairs / (32768**2 / 2) >= 0.8 * work(best, window)
    largest = [of_chip.sized(layout(Mask(window_size=1152))).forward.block_q for of_chip in (of_chip, FLOAT32)]
    assert largest == [{"v5e": 2048, "v6e": 4096}[generation], 512]


def test_cut_of_selected_blocks():
    def sizes(*heads: int, size: int, length: int = 32768) -> tuple[int, int, int]:
        num_heads, num_kv_heads, choices = heads
        blocks = SelectedBlocks(indices=jnp.zeros((1, 1, choices, 1), jnp.int32), block_size=size, num_blocks=8)
        found = Cut.of((num_heads, num_kv_heads), (length, length), blocks, *SELECTED[2])
        return found.heads, found.queries, found.keys

    assert sizes(16, 1, 1, size=64) == (16, 128, 64)
    assert sizes(32, 1, 1, size=48) == (16, 128, 128)
    assert sizes(16, 4, 4, size=64) == (4, 256, 64)
    assert sizes(16, 4, 1, size=32) == (4, 256, 32)
    assert sizes(16, 4, 16, size=512) == (1, 512, 512)
    assert sizes(16, 4, 16, size=1024) == (1, 1024, 1024)
    assert sizes(8, 8, 8, size=4096) == (1, 2048, 512)
    assert sizes(12, 6, 4, size=64) == (1, 1024, 64)
    assert sizes(8, 8, 8, size=1024, length=200) == (1, 256, 256)


def test_sums_of_keys_stay_where_there_is_room_for_whole_lines():
    assert resident_bytes(512, 64, (256, 512), 128 << 20) == (64 << 20) + RESERVE
    assert resident_bytes(512, 64, (512, 160), 128 << 20) == (64 << 20) + RESERVE
    assert resident_bytes(512, 64, (512, 272), 128 << 20) == 0
    assert resident_bytes(1024, 64, (256, 512), 128 << 20) == resident_bytes(512, 64, (256, 512), 64 << 20) == 0


def test_log_sigmoid_keeps_a_bias_beside_a_large_logit():
    x, bias = np.float32([30.1, 3000.1, 100000.3]), np.float32(-2.517)
    exact = -np.logaddexp(0, -(np.float64(x) + np.float64(bias))) - np.float64(bias)
    assert_close(_log_sigmoid(jnp.asarray(x), jnp.float32(bias)), exact)


def test_a_visit_brings_what_is_chosen_in_few_equal_parts():
    def visited(heads: int, size: int, top: int, *, wide: bool = True) -> int:
        blocks = SelectedBlocks(indices=jnp.zeros((1, 1, 1, top), jnp.int32), block_size=size, num_blocks=64)
        return Cut.of((heads, 1), (32768, 32768), blocks, *SELECTED[2], wide=wide).visited

    assert [visited(1, 512, top) for top in (1, 3, 5, 8)] == [1, 3, 3, 4]
    assert [visited(1, 1024, top) for top in (1, 3, 8)] == [1, 2, 2]
    assert [visited(16, 64, top) for top in (1, 5, 16)] == [2, 6, 8]
    assert [visited(16, 64, 16, wide=False), visited(1, 512, 8, wide=False)] == [2, 1]


@pytest.mark.parametrize(
    ("generation", "dtype", "wide"), [("v5e", "bfloat16", False), ("v6e", "bfloat16", True), ("v6e", "float32", False)]
)
def test_selected_blocks_are_cut_for_the_matrix_unit(generation: str, dtype: str, wide: bool):
    q = jnp.zeros((1, 512, 2, 64), dtype)
    selected = SelectedBlocks(indices=jnp.zeros((1, 512, 2, 1), jnp.int32), block_size=256, num_blocks=2)
    with target(generation):
        assert pallas_tpu._cut(SimpleNamespace(q=q, k=q, selected=selected)).wide == wide  # type: ignore[arg-type]

"""What queries choose: by hand, and of mixers that choose against dense attention in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.configs.probe import ProbeConfig
from plait.kernels import SelectedBlocks
from plait.models.build import BuildContext
from plait.models.looks.look import Look, Selection
from plait.models.mixers.sparse.dma import DMAConfig
from plait.models.mixers.sparse.dsa import DSAConfig
from plait.models.mixers.sparse.moba import MoBAConfig
from plait.models.mixers.sparse.nsa import NSAConfig
from plait.tests.models.common import layout, quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.probes.test_probes import look_at, measure, on
from plait.train.probes.base import Probes
from plait.train.probes.selection import _spread

LENGTH = 6


def choosing(numbers, documents=((6,),), weights=None, block_size=2):
    """A look at heads whose queries choose blocks of these numbers `[T, Hs, N]`, in each sequence."""
    indices = jnp.asarray(np.stack([numbers] * len(documents)), jnp.int32)
    length, heads = indices.shape[1:3]
    even = np.broadcast_to(
        (np.tri(length) / np.arange(1, length + 1)[:, None])[None, None], (len(documents), heads, length, length)
    )
    weights = even if weights is None else weights
    blocks = SelectedBlocks(indices=indices, block_size=block_size, num_blocks=length // block_size)
    dense = lambda rows: jnp.asarray(weights, jnp.float32)[:, :, rows]
    return look_at(weights, documents, selection=Selection(blocks, dense))


def test_by_hand():
    """Six tokens in blocks of two. One choice sees a query's own block and the first, the other its own alone; the last two rows leave
    tokens out for both, the two before for the second alone, and of even attention they keep 4, 2, 3 / 5, 4 / 6 and 1 / 3, ... of it."""
    own = np.arange(LENGTH) // 2
    numbers = np.stack([np.stack([own, np.where(own, 0, -1)], -1), np.stack([own, own * 0 - 1], -1)], axis=1)
    found = quick_jit(lambda: measure("selection", choosing(numbers)))()
    first = np.array([1, 1, 3 / 5, 4 / 6]).mean()
    second = np.array([1 / 3, 2 / 4, 1 / 5, 2 / 6]).mean()
    assert_close(found["selection_kept"], np.float32([first, second]))
    assert_close(found["selection_overlap"], np.full(2, np.mean([1 / 3, 2 / 4, 1 / 3, 2 / 4]), np.float32))
    ages = [[(2 + 1) / 3, (3 + 2 + 1) / 4, (4 + 3) / 3, (5 + 4 + 1) / 4], [0, 0.5, 0, 0.5]]
    assert_close(found["selection_age"], np.float32(np.mean(ages, 1)))
    entropy = lambda counts: -sum(c / sum(counts) * np.log(c / sum(counts)) for c in counts)
    assert_close(found["selection_entropy"], np.float32([entropy(c) / np.log(6) for c in ([4, 4, 2, 1, 2, 1], [2, 1, 2, 1])]))
    assert_close(found["selection_spread"], np.float32([3 / (10 / 6), 3 / 1]))


def test_spread_counts_the_blocks_that_neighbours_choose_together():
    """Runs of 128 queries in blocks of 16, of documents and padding, drawn at random with hidden blocks among them; the run whose queries
    see all that their documents have so far does not count, and a block of a document is no block of another."""
    length, size, documents = 512, 16, ((48, 40, 40, 96, 200), (512,))
    at = layout(*documents, length=length)
    segments, positions = np.asarray(at.segment_ids), np.asarray(at.positions)
    draw = np.random.default_rng(0)
    indices = np.stack([[[draw.permutation(34)[:3] - 1 for _ in range(2)] for _ in range(length)] for _ in range(2)])
    indices[0, :128] = np.arange(3)
    blocks = SelectedBlocks(indices=jnp.asarray(indices, jnp.int32), block_size=size, num_blocks=length // size)
    found = quick_jit(lambda: _spread(blocks, at))()
    ratios = []
    for b, run in itertools.product(range(2), range(4)):
        real = [t for t in range(128 * run, 128 * run + 128) if segments[b, t]]
        own = {t: positions[b, t] // size for t in real}
        seen = [[{(segments[b, t], n) for n in indices[b, t, h] if 0 <= n <= own[t]} for t in real] for h in range(2)]
        if any(len(one) <= own[t] for head in seen for t, one in zip(real, head, strict=True)):
            ratios.append([len(set.union(*head)) / np.mean([len(one) for one in head]) for head in seen])
    assert len(ratios) == 7
    assert_close(found, np.float32(np.mean(ratios, 0)))


def test_layers_by_hand():
    """The second layer's one head chooses what one of the first's two does; a layer in between chooses nothing."""
    own = np.arange(LENGTH) // 2
    two = np.stack([np.stack([own, 0 * own], -1), np.stack([own, own * 0 - 1], -1)], axis=1)
    observer = Probes(ProbeConfig(only="selection,selection_overlap"))

    @quick_jit
    def run():
        looks = choosing(two), look_at(on(6, 0, 0, 0, 0, 0, 0), [[6]]), choosing(two[:, 1:])
        return observer.across([observer.measure((look,)) for look in looks])

    first, none, last = run()
    assert "selection_layer_overlap" not in first and none == {}, "what chooses nothing has none"
    assert np.isnan(first.get("selection_overlap", np.nan)).sum() == 0 and "selection_overlap" not in last, "one choice"
    # shares of the first: 1 of the own block, 1/2 of the first block
    assert_close(last["selection_layer_overlap"], np.float32(np.mean([1 / 2, 2 / 3, 1 / 2, 2 / 3])))


def test_where_all_is_seen_there_is_nothing_to_tell():
    every = np.broadcast_to(np.arange(3), (LENGTH, 1, 3))
    found = quick_jit(lambda: measure("selection", choosing(every)))()
    assert found and all(np.isnan(value).all() for value in found.values())


@pytest.mark.parametrize("make", [MoBAConfig, NSAConfig, DMAConfig, DSAConfig], ids=["moba", "nsa", "dma", "dsa"])
def test_of_mixers_that_choose_against_dense_attention(make):
    """Documents, padding, and rows picked here and there, in float64."""
    config, length = dataclasses.replace(make.example(), positions=None), 40
    mixer = config.build(64, BuildContext(rngs=nnx.Rngs(0), seq_len=length))
    at = layout((25, 12), (length,), length=length)
    x = jax.random.normal(jax.random.key(1), (2, length, 64))
    rows = jnp.asarray([7, 24, 33, 38, 39])
    graph, state = nnx.split(mixer)

    @quick_jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        inputs, _ = mixer.project(x, at=at, state=None)
        look = Look(at=at, x=x, rows=rows, mixer=mixer, inputs=inputs)
        k = inputs.selected.k if make is NSAConfig else inputs.k
        d = inputs.d if make is DMAConfig else jnp.zeros(k.shape[:3])
        blocks = inputs.selected if make is DSAConfig else mixer.select(inputs, at)
        return Probes(ProbeConfig(only="selection")).measure((look,)), blocks, inputs.q, k, d

    found, blocks, q, k, d = run(state, x)
    q, k = (np.asarray(y, np.float64) for y in (q, np.repeat(k, 4 // k.shape[2], axis=2)))
    z = np.einsum("bthk,bshk->bhts", q, k) * mixer.scale
    z += np.repeat(np.asarray(d, np.float64), 4 // d.shape[2], axis=2).swapaxes(1, 2)[:, :, None]
    segments, positions = np.asarray(at.segment_ids), np.asarray(at.positions)
    kept, ages = [], []
    for b in range(2):
        for t in np.asarray(rows):
            past = np.flatnonzero((segments[b] == segments[b, t]) & (segments[b] > 0) & (np.arange(length) <= t))
            numbers = np.repeat(np.asarray(blocks.indices)[b, t], 4 // blocks.indices.shape[2], axis=0)
            seen = np.array([[positions[b, s] // blocks.block_size in numbers[h] for s in past] for h in range(4)])
            if len(past) and not seen.all():
                weights = np.exp(z[b, :, t, past].T)
                kept.append((weights * seen).sum(1) / weights.sum(1))
                ages.append([(t - past[seen[h]]).mean() for h in range(4)])
    assert len(kept) >= 3
    assert_close(found["selection_kept"], np.float32(np.mean(kept, 0)))
    assert_close(found["selection_age"], np.float32(np.mean(ages, 0)))

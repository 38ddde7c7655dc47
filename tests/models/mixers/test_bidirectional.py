"""Mixers whose tokens see all of their document, over every registered mixer that can: what the contract asks of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from plait.models.config import LMConfig
from plait.models.mixers.base import MIXERS, HeadMixer
from plait.models.mixers.moh import MoHConfig
from plait.tests.models import common
from plait.tests.models.mixers.subject import LENGTH, REAL, SEGMENTS, WIDTH, Case, layout
from plait.tests.models.mixers.subject import OPTIONS as ALL_OPTIONS
from plait.tests.tolerances import assert_close

BOTH_WAYS = {name: config.example() for name, config in MIXERS.all().items() if "bidirectional" in config.example().directions}
OPTIONS = {name: config for name, config in ALL_OPTIONS.items() if "bidirectional" in config.directions}
ROWS = [(LENGTH,), SEGMENTS, SEGMENTS, *[(n,) for n in SEGMENTS], (33,)]
WHOLE, PACKED, CHANGED, ALONE, LEFT = 0, 1, 2, slice(3, 6), 6
STARTS = np.cumsum((0, *SEGMENTS[:-1]))


@functools.cache
def rows() -> tuple[jax.Array, object]:
    """One batch whose rows are the cases, and where their tokens stand."""
    first, second = jax.random.normal(jax.random.key(3), (2, LENGTH, WIDTH))
    alone = [np.roll(second, -start, 0) * (np.arange(LENGTH) < n)[:, None] for start, n in zip(STARTS, SEGMENTS)]
    x = [first, second, np.where(REAL[:, None], second, 50.0), *alone, np.roll(alone[1], LENGTH - 33, 0)]
    at = layout(*ROWS)
    padded = jax.tree.map(lambda a: a.at[LEFT].set(jnp.roll(a[LEFT], LENGTH - 33)), at)  # padding before the document
    return jnp.stack(x).astype(jnp.float32), padded


@pytest.fixture(
    scope="module",
    params=[*BOTH_WAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name not in BOTH_WAYS)],
)
def seen(request):
    """The config, y, implied attention with values and head outputs, and which tokens an output early and one late depends on."""
    config = BOTH_WAYS.get(request.param) or OPTIONS[request.param]
    case = Case(config, causal=False)
    graph, variables = case.graph("float32"), case.variables()
    x, at = rows()

    @common.quick_jit
    def run(variables, x):
        mixer = nnx.merge(graph, variables)
        y, pull = jax.vjp(lambda x: mixer(x, at=at, carry={}).y, x)
        reached = [(pull(jnp.zeros_like(y).at[:, t].set(1.0))[0] != 0).any(-1) for t in (20, 40)]
        heads = None
        if isinstance(mixer, HeadMixer):
            inputs, _ = mixer.project(x, at=at, state=None)
            heads = mixer.implied(inputs, jnp.arange(LENGTH), at=at), inputs.v, mixer.attend(inputs, at=at, state=None)[0]
        return y, heads, reached

    return config, *jax.tree.map(np.asarray, run(variables, x))


def test_a_token_sees_all_of_its_document_and_nothing_else(seen):
    config, _, _, reached = seen
    reach = 0.9 if getattr(config, "window_size", None) is None and config.kind != "sparse" else 0.0
    ids = np.asarray(rows()[1].segment_ids)
    for t, matters in zip((20, 40), reached, strict=True):
        for row in (WHOLE, PACKED):
            assert matters[row, ids[row] == ids[row, t]].mean() > reach, t
            assert matters[row, t + 1] and matters[row, t - 1 if row == WHOLE else t], t
            assert not matters[row, ids[row] != ids[row, t]].any(), t


def test_packed_documents_equal_separate_ones(seen):
    y = seen[1]
    for start, n, alone in zip(STARTS, SEGMENTS, y[ALONE], strict=True):
        assert_close(y[PACKED, start : start + n], alone[:n])


def test_padding_is_inert_wherever_it_stands(seen):
    y = seen[1]
    np.testing.assert_array_equal(y[PACKED][REAL], y[CHANGED][REAL])
    assert np.isfinite(y).all()
    assert_close(y[LEFT, LENGTH - 33 :], y[ALONE][1][:33])


def test_implied_attention_reproduces_the_head_outputs(seen):
    config, _, heads, _ = seen
    if heads is None or config.opaque:
        pytest.skip("its outputs are no weighted sums of values")
    a, v, o = heads
    v = np.repeat(v, a.shape[1] // v.shape[2], axis=2)
    assert_close(np.einsum("hts,shv->thv", a[PACKED], v[PACKED])[REAL], o[PACKED][REAL])


@pytest.mark.parametrize("name", [name for name, config in MIXERS.all().items() if name not in ("moh", "parallel", "transfer")])
def test_a_model_of_a_direction_that_its_mixer_lacks_is_refused(name):
    config = MIXERS[name].example()
    for causal in (True, False):
        make = lambda causal=causal: LMConfig(
            d_model=WIDTH, num_layers=1, pattern=name, mixers={name: config}, vocab_size=8, causal=causal
        )
        if ("causal" if causal else "bidirectional") in config.directions:
            make()
        else:
            with pytest.raises(ValueError, match=rf"causal={causal} does not fit mixers.{name}, .* use causal={not causal}"):
                make()


def test_a_mixture_of_heads_has_the_directions_of_its_mixer():
    for config in BOTH_WAYS.values():
        if not isinstance(config, MoHConfig):
            assert MoHConfig(mixer=config).directions == config.directions

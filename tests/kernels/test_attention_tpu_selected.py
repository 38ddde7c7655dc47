"""The TPU kernels of attention to selected blocks in Pallas' TPU interpreter, with race detection, against the reference."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from plait.kernels import Mask, SelectedBlocks
from plait.kernels.attention import pallas_tpu
from plait.kernels.attention.tpu import key_sums, rectangles, walk
from plait.kernels.chips import CHIPS
from plait.tests.kernels import cases
from plait.tests.kernels.attention_calls import (
    Case,
    assert_mass_matches,
    assert_matches,
    inputs_of,
    own,
    segments_of,
    small_tiles,
)
from plait.tests.suites import usually


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


class Choice(NamedTuple):
    """What is selected: the keys of a block, and the heads that choose apart."""

    size: int
    choices: int
    case: Case = Case(heads=(4, 2), segments="several", stats=False)
    nobody: slice = slice(0)
    """The queries that choose nothing."""


CHOICES = {
    "each-head": Choice(16, 4, Case(heads=(4, 2), segments="several")),
    "one-for-all": Choice(128, 1),
    "groups": Choice(
        24, 2, Case(heads=(4, 2), segments="several", length=300, soft_cap=2.0, sinks=True, dtype="bfloat16"), slice(128, 256)
    ),
    "groups-beside-key-heads": Choice(40, 3, Case(heads=(6, 2), length=130, stats=False)),
    "large": Choice(200, 4, Case(heads=(4, 2), length=460)),
    "diagonal": Choice(256, 2, Case(heads=(2, 2), length=600), slice(256)),
    "diagonal-segments": Choice(256, 1, Case(heads=(1, 1), length=700, segments="long", stats=False, dtype="bfloat16")),
    "many-heads-sigmoid": Choice(64, 1, Case(heads=(8, 1), length=280, sigmoid=True)),
    "window-left-padding": Choice(
        32, 2, Case(mask=Mask(window_size=70, num_sink_tokens=3), heads=(4, 2), segments="left", length=300)
    ),
    "bias": Choice(16, 2, Case(heads=(2, 2), segments="several", bias=True, stats=False)),
}
MASSES = ["each-head", "one-for-all", "many-heads-sigmoid"]


def _selected(of: Choice) -> SelectedBlocks:
    count, batch = -(-of.case.length // of.size), 1 if of.case.segments is None else cases.BATCH
    indices = np.random.default_rng(0).integers(-1, count, (batch, of.case.length, of.choices, 2), np.int32)
    indices[:, of.nobody] = -1
    return SelectedBlocks(indices=jnp.asarray(indices), block_size=of.size, num_blocks=count)


@pytest.mark.parametrize(
    ("name", "few"),
    usually(
        [(name, few) for name in CHOICES for few in (0, 1024)],
        *(("groups", 1024), ("diagonal", 0), ("diagonal-segments", 1024), (MASSES[2], 0), ("window-left-padding", 1024)),
        newest=(("groups", 1024),),
    ),
)
def test_kernel_matches_reference_with_selected_blocks(name: str, few: int, monkeypatch: pytest.MonkeyPatch):
    """With sums of keys that come and go, and with sums that stay."""
    monkeypatch.setattr(key_sums, "FEW", few)
    of = CHOICES[name]
    assert_matches(of.case, inputs_of(of.case), own(segments_of(of.case)) | {"selected": _selected(of)})


WIDE = ("diagonal", "diagonal-segments", "groups", "many-heads-sigmoid", "each-head", "window-left-padding")


@pytest.mark.parametrize("name", usually(WIDE, *WIDE[:4], newest=("diagonal",)))
def test_selected_blocks_match_reference_on_a_wide_matrix_unit(name: str, monkeypatch: pytest.MonkeyPatch):
    """In tiles as large as blocks, so that what is visited together is of every kind, and in several rectangles each; and with the sums of one
    head leaving during the next."""
    monkeypatch.setattr(pallas_tpu, "_wide", lambda _: True)
    monkeypatch.setattr(pallas_tpu, "SELECTED", dict.fromkeys((2, 4), (1024, 1 << 18)))
    monkeypatch.setattr(rectangles, "MOST_WIDE", (1 << 15, 128))
    monkeypatch.setattr(rectangles, "EDGE_WIDE", (256, 128))
    monkeypatch.setattr(walk, "current", lambda: CHIPS["v6e"])
    of = CHOICES[name]
    assert_matches(of.case, inputs_of(of.case), own(segments_of(of.case)) | {"selected": _selected(of)})


@pytest.mark.parametrize(
    "name", usually(("groups", "many-heads-sigmoid", "diagonal-segments"), "groups", "many-heads-sigmoid", newest=())
)
def test_selected_blocks_match_reference_on_two_cores(name: str):
    """Which share rows and heads, or of one head the queries; with copies that are made as soon as they begin."""
    of = CHOICES[name]
    tokens = own(segments_of(of.case)) | {"selected": _selected(of)}
    how = {"chip": "v5p", "num_cores_or_threads": 2, "dma_execution_mode": "eager"}
    assert_matches(of.case, inputs_of(of.case), tokens, **how)


@pytest.mark.parametrize("name", usually(MASSES, *MASSES[::2], newest=MASSES[:1]))
def test_column_mass_of_selected_blocks_matches_reference(name: str):
    of = CHOICES[name]
    assert_mass_matches(of.case._replace(sigmoid=False), None, selected=_selected(of))

"""Heads that rest on one source of a mixture and work on another."""

import jax
import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.configs.probe import ProbeConfig
from plait.data.mixture.config import SourceConfig
from plait.tests.models.common import quick_jit
from plait.tests.tolerances import assert_close
from plait.tests.train.common import changed, program_of, random_batch, tiny
from plait.tests.train.probes.test_probes import look_at, on
from plait.train.probes.base import Probes
from plait.train.probes.collect import probe_arrays, probe_metrics
from plait.train.step import make_step

NAMES = ("web", "code", "books")
BOTH = "dormant,dormant_by_source"


def test_by_hand():
    """Two documents and padding, of one source, and a row of another: heads rest on the first, on the second, and on both in part."""
    first = np.concatenate([on(6, 0, 0, 0, 3, 3, 0), on(6, 0, 1, 2, 3, 4, 0), on(6, 0, 0, 2, 3, 3, 0)], 1)
    second = np.concatenate([on(6, 0, 1, 2, 3, 4, 5), on(6, 0, 0, 0, 0, 0, 0), on(6, 0, 0, 0, 0, 4, 5)], 1)
    observer = Probes(ProbeConfig(only=BOTH))
    measured = observer.measure((look_at(np.concatenate([first, second]), [[3, 2], [6]]),))
    (found,) = observer.across([measured], np.array([[1, 0, 0], [0, 1, 0]], bool))
    assert_close(found["dormant_by_source"][:, :2], np.float32([[1, 0], [0, 1], [2 / 3, 3 / 5]]))
    assert np.isnan(found["dormant_by_source"][:, 2]).all(), "nothing was looked at"
    assert_close(found["dormancy_gap"], np.float32([1, 1, 2 / 3 - 3 / 5]))
    (same,) = observer.across([measured], np.array([[1, 0, 0], [1, 0, 0]], bool))
    assert_close(same["dormant_by_source"][:, 0], found["dormant_share"])
    assert np.isnan(same["dormancy_gap"]).all(), "one source is no two"
    assert observer.across([measured])[0].keys() == {"dormant_share"}
    metrics = probe_metrics(probe_arrays([found]), observer.probes, sources=NAMES)
    np.testing.assert_allclose(metrics["attn/dormant_share/source/web"], 5 / 9, rtol=1e-6)
    assert "attn/dormant_share/source/books" not in metrics and metrics["attn/dormancy_gap"] == 1


OF = np.array([0, 1, 1, 0, 1, 0, 1, 1], np.int32)


def stepping(devices=1, **changes):
    """What gives the statistics of a step's layers, of which all rows are looked at."""
    config = changed(
        tiny(), {"data.sources": {name: SourceConfig(weight=1.0) for name in NAMES}, "data.batch_size": 8, **changes}
    )
    setup = program_of(config, devices=devices)
    observer = Probes(ProbeConfig(only=BOTH, sequences=8))
    step = quick_jit(make_step(setup.blueprint, setup.tx, setup.mesh, observer), out_shardings=(setup.shardings, None))
    return lambda batch: step(setup.fresh(), jax.device_put(batch, setup.layout.sharding), sources=OF)[1]["statistics"]


def of_source(batch, source, looked_at):
    """The batch with padding in place of rows of other sources, and of those that are not looked at."""
    own = ((source == OF) & looked_at)[:, None]
    return batch._replace(segment_ids=batch.segment_ids * own, positions=batch.positions * own, loss_mask=batch.loss_mask * own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "changes"),
    [
        (2, {"devices": 2, "mesh": MeshConfig(data=2), "optimizer.accumulate": 2}),
        (1, {}),
        pytest.param(
            2, {"devices": 2, "mesh": MeshConfig(data=1, pipeline=2), "optimizer.accumulate": 2}, marks=pytest.mark.slow
        ),
    ],
    ids=["micro-batches on two devices", "one device", "a pipeline"],
)
def test_each_source_is_what_its_rows_alone_have(every, changes, compile_cache):
    """Packed rows with padding; of micro-batches the last one, which has every second row."""
    batch, statistics, looked_at = random_batch(8), stepping(**changes), np.arange(8) % every == every - 1
    found = statistics(batch)
    for source in range(2):
        for got, alone in zip(found, statistics(of_source(batch, source, looked_at)), strict=True):
            assert_close(got["dormant_by_source"][:, source], alone["dormant_share"])
            assert np.isnan(got["dormant_by_source"][:, 2]).all() and np.isnan(alone["dormancy_gap"]).all()
    gap = np.concatenate([np.abs(np.diff(one["dormant_by_source"][:, :2])[:, 0]) for one in found])
    assert gap.max() > 0
    assert_close(np.concatenate([one["dormancy_gap"] for one in found]), gap)

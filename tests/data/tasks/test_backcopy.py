"""Bigram-Backcopy repeats the symbol before a trigger, and draws the others from one chain."""

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.backcopy import BackcopyTask, chain
from plait.data.tasks.draws import Draws


@pytest.fixture(scope="module")
def rows():
    """Tokens and targets of the default task, [1000, 128]."""
    return BackcopyTask().generate(Draws(np.arange(1000), "test"), 128)


def test_rows_follow_the_rule(rows):
    tokens, targets = rows
    assert (tokens[:, 0] == 0).all() and (tokens[:, 1:] > 0).all() and (tokens[:, 1] > 3).all()
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    row, before = np.nonzero(tokens[:, 1:] <= 3)
    np.testing.assert_array_equal(targets[row, before + 1], tokens[row, before])
    assert not ((tokens[:, 1:] <= 3) & (targets[:, 1:] <= 3)).any(), "triggers are never adjacent"


def test_other_symbols_come_as_often_as_the_chain_says(rows):
    """Also that it is as hard as the published one: about three tenths of the row are triggers, and the chain has 2.2 nats."""
    tokens, targets = (array[:, 1:] for array in rows)
    table = np.diff(chain(64, 3)[1], axis=1, prepend=0)
    for symbol in (4, 5, 9):
        drawn = targets[tokens == symbol]
        share, expected = np.bincount(drawn, minlength=65)[1:] / len(drawn), table[symbol - 1]
        assert (np.abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / len(drawn)) + 1e-12).all()
    nats = -(table * np.log(table)).sum(1)
    assert 2.1 < nats[tokens[tokens > 3] - 1].mean() < 2.3
    assert 0.25 < (tokens <= 3).mean() < 0.35


def test_scores_tell_the_copied_from_the_drawn():
    shape = (1, 4)
    batch = Batch(
        tokens=np.array([[0, 9, 2, 9]]),
        targets=np.array([[9, 2, 9, 5]]),
        segment_ids=np.ones(shape, np.int32),
        positions=np.arange(4)[None],
        loss_mask=np.ones(shape, np.float32),
    )
    found = BackcopyTask().scores(batch, np.array([[1.0, 2.0, 4.0, 8.0]]), np.array([[True, True, False, True]]))
    assert found == {"copy_accuracy": (0.0, 1.0), "copy_loss": (4.0, 1.0), "chain_loss": (10.0, 2.0)}


def test_triggers_must_leave_symbols():
    with pytest.raises(ValueError, match=r"num_triggers=64 must be below num_symbols=64; use 63 or less"):
        DataConfig(task=BackcopyTask(num_triggers=64))


def test_packed_sequences_are_those_of_separate_rows(tmp_path):
    packed = DataConfig(task=BackcopyTask(num_sequences=3), seq_len=96, batch_size=4)
    alone = DataConfig(task=BackcopyTask(), seq_len=32, batch_size=12)
    for read in ("read_train", "read_val"):
        batch = getattr(build_data(packed, tmp_path), read)(np.arange(4, 8))
        want = getattr(build_data(alone, tmp_path), read)(np.arange(12, 24))
        for name in ("tokens", "targets", "positions", "loss_mask"):
            np.testing.assert_array_equal(getattr(batch, name).reshape(12, 32), getattr(want, name))
        np.testing.assert_array_equal(batch.segment_ids, np.tile(np.repeat([1, 2, 3], 32), (4, 1)))
    with pytest.raises(ValueError, match=r"data\.task\.num_sequences=3 must divide data\.seq_len=64; use data\.seq_len=66"):
        DataConfig(task=BackcopyTask(num_sequences=3), seq_len=64)

"""Copying asks for each symbol where it comes next, and for nothing else."""

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.tasks.copying import CopyingTask
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED


@pytest.mark.parametrize(("length", "seq_len"), [(None, 16), (None, 17), (5, 16), (1, 2)])
def test_every_symbol_is_asked_for_once_in_order(length, seq_len):
    task, n = CopyingTask(num_symbols=9, length=length), length or seq_len // 2
    tokens, targets = task.generate(Draws(np.arange(4), "test"), seq_len)
    string = tokens[:, :n]
    assert ((string > 0) & (string <= 9)).all()
    np.testing.assert_array_equal(tokens[:, n : n + 1], np.zeros_like(tokens[:, n : n + 1]))
    np.testing.assert_array_equal(targets[:, n : 2 * n], string)
    following = tokens[:, n + 1 : 2 * n]
    np.testing.assert_array_equal(following, string[:, : following.shape[1]])
    asked = np.zeros(tokens.shape, bool)
    asked[:, n : 2 * n] = True
    assert (targets[~asked] == NOT_ASKED).all()


def test_a_string_longer_than_half_a_row_is_refused():
    with pytest.raises(ValueError, match=r"task.length=9 must be at most half of data.seq_len=16; use 8 or less"):
        DataConfig(task=CopyingTask(length=9), seq_len=16)

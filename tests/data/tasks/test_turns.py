"""Recall in turns, read off its rows."""

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.draws import Draws
from plait.data.tasks.turns import TurnsTask


@pytest.mark.parametrize(
    ("fields", "seq_len"),
    [({}, 512), ({"num_kv_pairs": 6, "num_turns": 3, "num_queries": 2, "vocab_size": 14}, 27), ({"num_turns": 3}, 101)],
)
def test_answers_are_the_pairs_and_stay_in_the_row(fields, seq_len):
    task = TurnsTask(**fields)
    n, half, size = task.num_kv_pairs, task.vocab_size // 2, task.num_queries
    tokens, targets = task.generate(Draws(np.arange(16), "test"), seq_len)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * n : 2], row[1 : 2 * n : 2], strict=True))
        assert len(pairs) == n == len(set(pairs.values())) and min(pairs) > 0 and max(pairs) < half <= min(pairs.values())
        places = [at for at, target in enumerate(asked) if target >= 0]
        assert [asked[at] for at in places] == [pairs[row[at]] for at in places] == [row[at + 1] for at in places]
        assert len({row[at] for at in places}) == len(places) == task.num_turns * size, "no key is asked twice"
        turns = np.reshape(places, (task.num_turns, size))
        assert (np.diff(turns, axis=1) == 2).all() and all(row[turn[0] - 1] == 0 for turn in turns)
        gaps = np.diff([2 * n, *(turn[-1] + 2 for turn in turns)])
        assert gaps.sum() == seq_len - 2 * n and np.ptp(gaps) <= 1
        rest = set(range(2 * n, seq_len)) - {*places, *(at + 1 for at in places)}
        assert not any(row[at] for at in rest)


def test_scores_by_turn(tmp_path):
    """Rows of padding do not count; the second turn is right in its first query, the third not at all."""
    data = DataConfig(task=TurnsTask(num_turns=3, val_rows=4), seq_len=128, batch_size=6)
    batch: Batch = build_data(data, tmp_path).val[0]
    right = batch.loss_mask > 0
    for row in range(4):
        places = np.flatnonzero(batch.loss_mask[row])
        right[row, places[3:] if row else places[3:4]] = False
    scores = data.task.scores(batch, np.zeros(right.shape), right)
    assert [scores[f"accuracy_turn_{k}"] for k in (1, 2, 3)] == [(8.0, 8.0), (4.0, 8.0), (2.0, 8.0)]
    assert scores["whole"] == (0.0, 4.0) and scores["accuracy"] == (14.0, 24.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": 9}, r"turns\.num_queries=9 in 4 turns are 36 keys, and num_kv_pairs=32 must be as many or more"),
        ({"num_kv_pairs": 600}, r"turns\.num_kv_pairs=600 must be at most the 511 keys of vocab_size=1024; use vocab_size=1202 or more"),
        ({"num_kv_pairs": 300}, r"data\.task\.num_kv_pairs=300 with 4 turns of 2 queries needs rows of 620 tokens, not data\.seq_len=512"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=TurnsTask(**fields), seq_len=512)

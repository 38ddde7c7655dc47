"""MQAR rows against a checker written by hand and against the published generator, as the paper's code has it."""

import numpy as np
import pytest

from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.mqar import MQARTask

CASES = {
    "figure 2": (MQARTask(filler="zero"), 64),
    "Based": (MQARTask(num_kv_pairs=64), 256),
    "small": (MQARTask(vocab_size=21, num_kv_pairs=5), 20),
    "one pair": (MQARTask(vocab_size=9, num_kv_pairs=1, filler="zero"), 4),
    "anywhere": (MQARTask(vocab_size=200, num_kv_pairs=4, power_a=1.0), 64),
}


def rows(task, seq_len, count, tmp_path):
    return build_data(DataConfig(task=task, seq_len=seq_len, batch_size=count), tmp_path).read_train(np.arange(count))


def check_row(tokens, targets, mask, task):
    """Walks one row as a reader would."""
    n, half = task.num_kv_pairs, task.vocab_size // 2
    length = len(tokens)
    assert 4 * n <= length
    known = {}
    for at in range(0, 2 * n, 2):
        key, value = tokens[at], tokens[at + 1]
        assert 1 <= key < half <= value < task.vocab_size
        assert key not in known and value not in known.values()
        known[key] = value
    asked = [at for at in range(length) if mask[at]]
    assert len(asked) == n and sorted(tokens[at] for at in asked) == sorted(known), "each key is asked once"
    for at in asked:
        assert at >= 2 * n and (at - 2 * n) % 2 == 0, "a query begins a slot of two after the pairs"
        assert targets[at] == known[tokens[at]]
    for at in range(length):
        if at not in asked:
            assert targets[at] == 0
            if at >= 2 * n and task.filler == "zero":
                assert tokens[at] == 0


@pytest.mark.parametrize(("task", "seq_len"), CASES.values(), ids=CASES)
def test_rows_ask_each_key_once_and_hold_the_answer(task, seq_len, tmp_path):
    batch = rows(task, seq_len, 64, tmp_path)
    for tokens, targets, mask in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.loss_mask.tolist()):
        check_row(tokens, targets, mask, task)
    assert len(np.unique(batch.tokens, axis=0)) > 8


def published(num_examples, vocab_size, length, num_kv_pairs, power_a, rng):
    """Tokens and labels (-100: ignored) made by the steps of the authors' generator, without its random filler."""
    context = 2 * num_kv_pairs
    space = (length - context) // 2
    law = power_a * np.arange(1, space + 1) ** (power_a - 1)
    tokens = np.zeros((num_examples, length), int)
    labels = np.full((num_examples, length), -100)
    for row, label in zip(tokens, labels):
        keys = rng.choice(np.arange(1, vocab_size // 2), size=num_kv_pairs, replace=False)
        values = rng.choice(np.arange(vocab_size // 2, vocab_size), size=num_kv_pairs, replace=False)
        gaps = rng.choice(space, size=num_kv_pairs, replace=False, p=law / law.sum())
        row[0:context:2], row[1:context:2] = keys, values
        row[context + 2 * gaps] = keys
        label[context + 2 * gaps] = values
    return tokens, labels


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_distribution_is_the_published_one(power_a, tmp_path):
    """How often each place is asked, by which pair, and what stands there: within five standard deviations of each other."""
    n, length, count = 3, 24, 20_000
    task = MQARTask(vocab_size=32, num_kv_pairs=n, power_a=power_a, filler="zero")
    batch = rows(task, length, count, tmp_path)
    theirs, labels = published(count, 32, length, n, power_a, np.random.default_rng(0))

    def shares(tokens, targets, asked):
        pair = (tokens[:, None, :] == tokens[:, 0 : 2 * n : 2, None]) & asked[:, None, :]  # [R, n, T]
        answers = (targets[..., None] == np.arange(32)) & asked[..., None]
        first = np.argmax(pair[:, 0], axis=-1) < np.argmax(pair[:, 1], axis=-1)
        return np.concatenate([pair.mean(0).ravel(), answers.mean((0, 1)), [first.mean()]])

    ours = shares(batch.tokens, batch.targets, batch.loss_mask > 0)
    want = shares(theirs, labels, labels != -100)
    np.testing.assert_array_less(np.abs(ours - want), 5 * np.sqrt(2 * np.maximum(want * (1 - want), 1e-3) / count))
    if power_a < 1:
        assert ours[2 * n] > 2 * ours[2 * n + 2] > 0, "the first slot is asked most"


def test_filler_is_any_id(tmp_path):
    task = MQARTask(vocab_size=40, num_kv_pairs=2)
    batch = rows(task, 32, 2000, tmp_path)
    filler = batch.tokens[:, 4:][batch.loss_mask[:, 4:] == 0]
    shares = np.bincount(filler, minlength=40) / filler.size
    assert np.abs(shares - 1 / 40).max() < 5 * np.sqrt(1 / 40 / filler.size)


@pytest.mark.parametrize(
    ("fields", "seq_len", "message"),
    [
        ({"num_kv_pairs": 17}, 64, r"data\.task\.num_kv_pairs=17 must be at most a quarter of data\.seq_len=64; use 16 or less"),
        ({}, 63, r"data\.task\.num_kv_pairs=4 needs rows of an even length, not data\.seq_len=63; use 64"),
        (
            {"vocab_size": 64},
            64,
            r"data\.task\.vocab_size=64 must be above data\.seq_len=64; use 65 or more, or data\.seq_len=62 or less",
        ),
        ({"num_kv_pairs": 0}, 64, r"mqar\.num_kv_pairs=0 must be a whole number from 1"),
        ({"vocab_size": -3}, 64, r"mqar\.vocab_size=-3 must be a whole number from 1"),
        ({"power_a": 0.0}, 64, r"mqar\.power_a=0\.0 must be a finite number above 0"),
        ({"power_a": float("nan")}, 64, r"mqar\.power_a=nan must be a finite number above 0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=MQARTask(**fields), seq_len=seq_len)

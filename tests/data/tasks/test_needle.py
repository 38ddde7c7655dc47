"""Needles against the steps of the published pass key test: its text, its places and its keys."""

import re

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tasks.draws import Draws
from plait.data.tasks.generated import NOT_ASKED
from plait.data.tasks.needle import NeedleTask

GARBAGE = " ".join(["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 30)


def prompt(filler, before, key):
    """The published prompt with its parts at given places."""
    return "\n".join(
        [
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
            "I will quiz you about the important information there.",
            GARBAGE[:before],
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            GARBAGE[: filler - before],
            "What is the pass key? The pass key is",
        ]
    )


CASES = {
    "full row": ({}, 512),
    "long": ({"key_digits": 7}, 1500),
    "fixed": ({"filler": 100, "depth": 0.25, "key_digits": 3}, 512),
    "no haystack": ({"filler": 0}, 512),
    "one digit": ({"key_digits": 1, "filler": 9}, 300),
}


@pytest.mark.parametrize(("fields", "seq_len"), CASES.values(), ids=CASES)
def test_rows_are_the_published_prompt_and_its_answer(fields, seq_len):
    task = NeedleTask(**fields)
    tokens, targets = task.generate(Draws(np.arange(32), "test"), seq_len)
    seen = set()
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [at for at, target in enumerate(asked) if target != NOT_ASKED]
        key = "".join(chr(asked[at]) for at in places)
        assert re.fullmatch(rf"\d{{{task.key_digits}}}", key) and key[0] != "0"
        assert places == list(range(places[0], places[0] + len(key)))
        text = bytes(row[: places[-1] + 1]).decode() + key[-1]
        filler = seq_len - len(prompt(0, 0, key) + " " + key) + 1 if task.filler is None else task.filler
        before = text.index("\nThe pass key is") - text.index("\n") - 1
        assert text == prompt(filler, before, key) + " " + key
        assert task.depth is None or before == round(task.depth * filler)
        assert not any(row[places[-1] + 1 :]) and (task.filler is not None or places[-1] == seq_len - 1)
        seen.add((before, key))
    assert len(seen) > 4


def test_a_row_worked_by_hand():
    task = NeedleTask(filler=12, depth=0.75, key_digits=2)
    tokens, targets = task.generate(Draws(np.arange(1), "by hand"), 300)
    a, b = (chr(digit) for digit in targets[0][targets[0] != NOT_ASKED])
    text = bytes(tokens[0].tolist()).decode()
    body = text[text.index("\n") + 1 :]
    assert body.rstrip("\0") == (
        f"The grass\nThe pass key is {a}{b}. Remember it. {a}{b} is the pass key.\nThe\nWhat is the pass key? The pass key is {a}"
    )
    assert targets[0].tolist().index(ord(a)) == text.index("key is " + a + "\0") + len("key is ") - 1


def test_places_and_keys_are_uniform():
    """Every depth, both ends included, and every key of five digits."""
    count, filler = 20_000, 40
    tokens, targets = NeedleTask(filler=filler).generate(Draws(np.arange(count), "uniform"), 400)
    first = ((tokens >= ord("0")) & (tokens <= ord("9"))).argmax(1)
    places = np.bincount(first - first.min(), minlength=filler + 1) / count
    assert len(places) == filler + 1 and np.abs(places - 1 / (filler + 1)).max() < 5 * np.sqrt(1 / filler / count)
    digits = targets[targets != NOT_ASKED].reshape(count, 5) - ord("0")
    for at, column in enumerate(digits.T):
        shares = np.bincount(column, minlength=10) / count
        least = int(at == 0)
        assert not shares[:least].any() and np.abs(shares[least:] - 1 / (10 - least)).max() < 5 * np.sqrt(0.1 / count)


def test_scores_by_depth(tmp_path):
    """A model that tells keys of the first half, but for one digit of one of them."""
    task = NeedleTask(filler=200)
    rows = build_data(DataConfig(task=task, seq_len=512, batch_size=64), tmp_path).read_train(np.arange(64))
    batch = Batch(*(np.where(np.arange(64)[:, None] < 60, array, 0).astype(array.dtype) for array in rows))
    texts = [bytes(row.tolist()).decode() for row in batch.tokens]
    depths = np.array(
        [(text.index("\nThe pass") - text.index("\n") - 1) / 200 if any(text.strip("\0")) else -1 for text in texts]
    )
    told = (depths >= 0) & (depths < 0.5)
    right = (batch.loss_mask > 0) & told[:, None]
    slip = int(told.argmax())
    right[slip, batch.loss_mask[slip].argmax()] = False
    scores = task.scores(batch, np.zeros_like(batch.loss_mask), right)
    assert scores["accuracy"] == (told.sum() * 5 - 1, 300) and scores["found"] == (told.sum() - 1, 60)
    for part in range(10):
        here = (depths >= part / 10) & ((depths < (part + 1) / 10) | ((part == 9) & (depths == 1)))
        want = sum(told & here) - here[slip]
        assert scores.get(f"found_at_{10 * part:02d}_to_{10 * part + 10}", (0, 0)) == (want, here.sum())
    assert sum(weight for name, (_, weight) in scores.items() if "_at_" in name) == 60


@pytest.mark.parametrize(
    ("fields", "seq_len", "message"),
    [
        ({}, 251, r"data\.task\.key_digits=5 needs rows of at least 252 tokens, not data\.seq_len=251; use data\.seq_len=252"),
        ({"filler": 300}, 512, r"data\.task\.filler=300 must be at most data\.seq_len=512 less 252; use 260 or less, or .*=552"),
        ({"depth": 1.5}, 512, r"needle\.depth=1\.5 must be a finite number of at least 0 and at most 1"),
        ({"key_digits": 0}, 512, r"needle\.key_digits=0 must be a whole number from 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields, seq_len, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(task=NeedleTask(**fields), seq_len=seq_len)

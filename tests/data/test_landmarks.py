"""Landmarks stand at the end of every block of a document, and every token of the text is predicted once as without them."""

import json

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig
from plait.data.landmarks import Landmarks
from plait.data.loader import build_data
from plait.data.tasks.landmark import LandmarkTask
from plait.data.tasks.ppl import PerplexityTask
from tests.data.conftest import make_texts

L = 99


def test_by_hand():
    # two documents of 5 and 2 tokens and a place of padding, in blocks of 3
    batch = Batch(
        tokens=np.array([[1, 2, 3, 4, 5, 6, 7, 0]], np.int32),
        targets=np.array([[2, 3, 4, 5, 50, 7, 51, 0]], np.int32),
        segment_ids=np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32),
        positions=np.array([[0, 1, 2, 3, 4, 0, 1, 0]], np.int32),
        loss_mask=np.array([[0, 1, 1, 1, 1, 1, 1, 0]], np.float32),
    )
    got = Landmarks(3, L).into_rows(batch, 12)
    np.testing.assert_array_equal(got.tokens, [[1, 2, L, 3, 4, L, 5, 6, 7, L, 0, 0]])
    np.testing.assert_array_equal(got.targets, [[2, 0, 3, 4, 0, 5, 50, 7, 0, 51, 0, 0]])
    np.testing.assert_array_equal(got.segment_ids, [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    np.testing.assert_array_equal(got.positions, [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(got.loss_mask, [[0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0]])
    assert [new.dtype for new in got] == [old.dtype for old in batch]


@pytest.mark.parametrize("every", [2, 3, 7, 64, 100])
@pytest.mark.parametrize("seq_len", [100, 128, 129])
def test_rows_have_room_for_the_landmarks_of_one_document_and_not_of_a_token_more(every, seq_len):
    landmarks = Landmarks(every, L)
    room = landmarks.room(seq_len)
    assert len(landmarks.into_text(range(room))) <= seq_len < len(landmarks.into_text(range(room + 1)))


def test_text_is_as_one_row():
    ids = list(range(10))
    assert Landmarks(4, L).into_text(ids) == [0, 1, 2, L, 3, 4, 5, L, 6, 7, 8, L, 9]
    assert Landmarks(4, L).into_text(ids[:6])[-1] == L, "the block is full, whatever follows"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landmarks")
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(60)), "utf-8")

    def build(task, seq_len):
        options = {"source": str(folder / "all.jsonl"), "cache_dir": str(folder), "tokenizer": "byte", "val_fraction": 0.2}
        return build_data(DataConfig(task=task, seq_len=seq_len, **options), folder / "run")

    return build


def test_the_same_text_is_predicted_from_the_same_past(opened):
    with_landmarks, plain = opened(LandmarkTask(block_size=8), 128), opened(PerplexityTask(), 112)
    assert with_landmarks.vocab_size == plain.vocab_size + 1
    index = np.arange(plain.num_train_rows)
    got, want = with_landmarks.read_train(index), plain.read_train(index)
    assert got.tokens.shape == (len(index), 128)
    mark = got.tokens == plain.vocab_size
    np.testing.assert_array_equal(mark, (got.segment_ids > 0) & (got.positions % 8 == 7))
    text = (got.segment_ids > 0) & ~mark
    for name in ("tokens", "segment_ids"):
        np.testing.assert_array_equal(getattr(got, name)[text], getattr(want, name)[want.segment_ids > 0])
    np.testing.assert_array_equal(got.targets[got.loss_mask > 0], want.targets[want.loss_mask > 0])
    assert got.positions.max() == 127 and not got.targets[got.loss_mask == 0].any()


def test_a_block_longer_than_rows_is_refused():
    with pytest.raises(ValueError, match=r"task\.block_size=65 is more than data\.seq_len=64, .*; use 64 or less"):
        DataConfig(task=LandmarkTask(block_size=65), seq_len=64)
    with pytest.raises(ValueError, match=r"block_size=1 must hold a token and its landmark"):
        LandmarkTask(block_size=1)

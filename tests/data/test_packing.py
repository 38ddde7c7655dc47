"""Rows hold every token once, and nothing of one document reaches another."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.packing import Documents, Packing, shuffled_order

START, END = 900, 901


def documents_of(lengths):
    """Documents whose tokens are all different: document d, token i is 10 d + i + 1 when short."""
    lengths = np.array(lengths, np.int64)
    tokens = np.arange(1, lengths.sum() + 1).astype(np.uint16)
    return Documents(tokens, np.cumsum(lengths) - lengths, lengths, np.arange(len(lengths), dtype=np.uint64))


def all_rows(packing):
    return packing.rows(np.arange(packing.num_rows))


def test_rows_with_a_start_token_by_hand():
    batch = all_rows(Packing(documents_of([2, 3]), seq_len=4, start_id=START, end_id=END))  # 1 2 | 3 4 5
    np.testing.assert_array_equal(batch.tokens, [[START, 1, 2, START], [3, 4, 5, 0]])
    np.testing.assert_array_equal(batch.targets, [[1, 2, END, 3], [4, 5, END, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2], [1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0], [0, 1, 2, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[1, 1, 1, 1], [1, 1, 1, 0]])


def test_rows_without_a_start_token_by_hand():
    batch = all_rows(Packing(documents_of([2, 1, 3]), seq_len=5, start_id=None, end_id=END))  # 1 2 | 3 | 4 5 6
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[2, END, END, 5, 6], [END, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 2, 3, 3], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])


def test_prompts_do_not_count_nor_answers_without_theirs():
    documents = dataclasses.replace(documents_of([3, 4, 2]), given=np.array([2, 1, 0]))  # 1 2 3 | 4 5 6 7 | 8 9
    batch = all_rows(Packing(documents, seq_len=6, start_id=START, end_id=END))
    np.testing.assert_array_equal(batch.targets, [[1, 2, 3, END, 4, 5], [6, 7, END, 8, 9, END]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1]])
    batch = all_rows(Packing(documents.take(np.array([1])), seq_len=6, start_id=None, end_id=END))
    np.testing.assert_array_equal(batch.targets, [[5, 6, 7, END, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[1, 1, 1, 1, 0, 0]])


def test_rows_have_the_types_of_a_batch():
    batch = Packing(documents_of([5]), seq_len=2, start_id=None, end_id=END).rows(np.array([1, 0, 7]))
    assert [array.dtype.name for array in batch] == ["int32"] * 4 + ["float32"]
    assert all(array.shape == (3, 2) for array in batch)
    assert not any(array[2].any() for array in batch)  # past the end: padding


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 33),
    start=st.booleans(),
    data=st.data(),
)
def test_every_token_is_predicted_once_and_only_from_its_own_document(lengths, seq_len, start, data):
    documents = documents_of(lengths)
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    packing = Packing(documents.take(order), seq_len=seq_len, start_id=START if start else None, end_id=END)
    batch = all_rows(packing)
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(real, batch.loss_mask == 1)

    # Targets in reading order are the documents one after the other, each with its end (and without a start its first is given).
    first = 0 if start else 1
    expected = [[*documents.tokens[s + first : s + n], END] for s, n in zip(documents.starts[order], documents.lengths[order])]
    np.testing.assert_array_equal(batch.targets[real], np.concatenate(expected))

    # Only the last row is padded, and only at its end.
    assert real[:-1].all()
    assert (np.diff(real[-1].astype(int)) <= 0).all()

    # Inside a piece the inputs are the targets shifted by one, positions count from 0, and no piece spans two documents.
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & real[:, 1:]
    np.testing.assert_array_equal(batch.tokens[:, 1:][same], batch.targets[:, :-1][same])
    assert (batch.targets[:, :-1][same] != END).all()
    np.testing.assert_array_equal((np.diff(batch.positions, axis=1) == 1)[same], True)
    starts = np.concatenate([np.ones_like(real[:, :1]), batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]], axis=1) & real
    assert (batch.positions[starts] == 0).all()
    assert (batch.segment_ids[:, 0] == 1).all()
    assert np.isin(np.diff(batch.segment_ids, axis=1)[real[:, 1:]], [0, 1]).all()


@settings(max_examples=30, deadline=None)
@given(indices=st.lists(st.integers(0, 19), min_size=1, max_size=8))
def test_any_rows_in_any_order_equal_the_whole(indices):
    packing = Packing(documents_of([17, 1, 40, 3, 36]), seq_len=5, start_id=START, end_id=END)
    whole, some = all_rows(packing), packing.rows(np.array(indices))
    for a, b in zip(whole, some):
        np.testing.assert_array_equal(a[np.array(indices)], b)


def test_offsets_beyond_32_bits_are_exact():
    """A corpus of 2^40 tokens, of which a broadcast view stands in for the file."""
    tokens = np.broadcast_to(np.array([7], np.uint16), (1 << 40,))
    lengths = np.array([1 << 39, (1 << 39) - 1], np.int64)
    documents = Documents(tokens, np.array([0, 1 << 39]), lengths, np.zeros(2, np.uint64))
    packing = Packing(documents, seq_len=512, start_id=None, end_id=END)
    batch = packing.rows(np.array([0, (1 << 30) - 1, 1 << 30, packing.num_rows - 1]))
    assert batch.targets[:, -1].tolist() == [7, END, 7, 0]
    assert batch.loss_mask.sum() == 4 * 512 - 1


def test_shuffled_order_is_a_permutation_that_the_salt_decides():
    hashes = np.arange(1000, dtype=np.uint64)
    one = shuffled_order(hashes, "train", 0)
    assert sorted(one.tolist()) == list(range(1000))
    np.testing.assert_array_equal(one, shuffled_order(hashes, "train", 0))
    assert (one != shuffled_order(hashes, "train", 1)).mean() > 0.9
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.1


def test_shuffled_order_never_changes():
    """Resuming an old run depends on it."""
    assert shuffled_order(np.arange(8, dtype=np.uint64), "rows", 3).tolist() == [0, 3, 6, 4, 1, 5, 7, 2]

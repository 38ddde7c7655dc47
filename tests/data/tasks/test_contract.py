"""What every registered task keeps to: rows by number, whoever reads them, whenever."""

import dataclasses
import json
import types
import typing
from typing import Literal

import numpy as np
import pytest

from plait.configs import codec
from plait.configs.components import children
from plait.data.batch import Batch
from plait.data.config import DataConfig, DataError
from plait.data.loader import build_data
from plait.data.tasks.base import TASKS
from plait.data.tasks.generated import GeneratedTask
from tests.data.conftest import make_texts

BATCH_SIZE = 8
SPLITS = {"one row each": [[i] for i in range(8)], "halves": np.split(np.arange(8), 2), "uneven": [[0, 3], [1], [2, 4, 5, 6, 7]]}
ROWS = {"needles": 1024, "variable_tracking": 1024, "common_words": 2048, "frequent_words": 2048}
"""Tokens that hold other values of these tasks' fields, too, where 512 do not."""
GENERATED = [name for name, task in TASKS.all().items() if issubclass(task, GeneratedTask)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Where tasks that read text find some."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(60)), "utf-8")
    return folder


@pytest.fixture
def opened(text, tmp_path):
    """Opens a task by name, with few rows held out; the defaults of a task fit the default rows."""

    def build(name, rows=None, task=None, **fields):
        config = DataConfig(
            **{
                "task": task or TASKS[name](**({"val_rows": 20} if name in GENERATED else {})),
                "source": str(text / "all.jsonl"),
                "cache_dir": str(text / "cache"),
                "tokenizer": "byte",
                "batch_size": BATCH_SIZE,
                "val_fraction": 0.2,
                **fields,
            }
        )
        return build_data(config, tmp_path / "run", rows=rows)

    return build


def take(data, count):
    iterator = data.train()
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def arrays(batches):
    return [array for batch in batches for array in batch]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, two in zip(arrays(left), arrays(right), strict=True):
        np.testing.assert_array_equal(one, two)


def rows_of(batches):
    return {row.tobytes() for batch in batches for row in batch.tokens[batch.loss_mask.any(1)]}


@pytest.fixture(params=TASKS.all())
def name(request):
    return request.param


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_rows_are_the_same_for_any_hosts(name, split, opened):
    whole, parts = opened(name), [opened(name, np.asarray(rows)) for rows in split]
    order = np.argsort(np.concatenate(split))
    joined = lambda shares: [Batch(*(np.concatenate(one)[order] for one in zip(*share))) for share in shares]
    assert_same(take(whole, 3), joined(zip(*(take(part, 3) for part in parts))))
    assert len({len(whole.val), *(len(part.val) for part in parts)}) == 1
    assert_same(list(whole.val)[-2:], joined(zip(*(list(part.val)[-2:] for part in parts))))
    assert_same([whole.whole()], [parts[0].whole()])


def test_resumed_is_straight_on(name, opened):
    data = opened(name)
    straight = take(data, 6)
    first = data.train()
    assert_same([next(first) for _ in range(3)], straight[:3])
    state = json.loads(json.dumps(first.get_state()))
    again = opened(name).train()
    again.set_state(state)
    assert_same([next(again) for _ in range(3)], straight[3:])
    with pytest.raises(DataError, match="belongs to other data: seed was 0 and is 1"):
        opened(name, seed=1).train().set_state(state)
    for iterator in (first, again):
        iterator.close()


def test_held_out_rows_are_not_trained_on(name, opened):
    data = opened(name)
    held, trained = rows_of(data.val), rows_of(take(data, 40))
    assert held and not held & trained
    assert_same(list(data.val), list(data.val))


def test_validation_is_its_number_of_rows(name, opened):
    data = opened(name)
    assert len(data.val) == -(-data.num_val_rows // BATCH_SIZE)
    assert sum(int(batch.loss_mask.any(1).sum()) for batch in data.val) == data.num_val_rows


def test_batches_are_what_a_step_takes(name, opened):
    data = opened(name)
    for batch in [*take(data, 3), data.val[0], data.whole()]:
        assert [array.shape for array in batch] == [(BATCH_SIZE, data.config.seq_len)] * 5
        assert [array.dtype for array in batch] == [np.int32] * 4 + [np.float32]
        for ids in (batch.tokens, batch.targets):
            assert ids.min() >= 0 and ids.max() < data.vocab_size
        assert set(np.unique(batch.loss_mask)) <= {0.0, 1.0} and batch.loss_mask.any(1).all()
        assert not batch.targets[batch.loss_mask == 0].any(), "targets that do not count are 0"
        assert (batch.segment_ids[batch.loss_mask > 0] > 0).all(), "padding is not predicted"
        goes_on = (np.diff(batch.segment_ids, axis=1) == 0) & (batch.segment_ids[:, 1:] > 0)
        assert (np.diff(batch.positions, axis=1)[goes_on] == 1).all() and not batch.positions[:, 0].any()
    known = data.config.task.vocabulary(data.config)
    assert known is None or known == data.vocab_size


def test_seeds_differ(name, opened):
    one, two = (opened(name, seed=seed) for seed in (0, 1))
    assert rows_of(take(one, 1)) != rows_of(take(two, 1))


def test_config_and_facts_are_json(name, opened):
    data = opened(name)
    assert codec.decode(DataConfig, json.loads(json.dumps(codec.encode(data.config)))) == data.config
    assert ("task", data.config.task) in list(children(data.config))
    assert json.loads(json.dumps(data.summary())) == data.summary()
    assert all(isinstance(text, str) for text in data.strings([0, 1]))


def test_perfect_answers_score_as_such(name, opened):
    data = opened(name)
    task = data.config.task
    if not task.has_answers:
        pytest.skip("its targets are text, which has no right answer")
    whole = data.val[0]
    half = Batch(*(np.where(np.arange(BATCH_SIZE)[:, None] < 4, array, 0).astype(array.dtype) for array in whole))
    for batch in (whole, half):
        scores = task.scores(batch, np.zeros(batch.tokens.shape, np.float32), batch.loss_mask > 0)
        assert scores and all(np.isfinite(total) and weight > 0 for total, weight in scores.values())
        if "accuracy" in scores:
            assert scores["accuracy"][0] == scores["accuracy"][1]


def others(kind, value):
    """Other values of a field."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [value for one in typing.get_args(kind) for value in others(one, None)]
    if typing.get_origin(kind) is Literal:
        return [one for one in typing.get_args(kind) if one != value]
    return {bool: [not value], int: [2 * (value or 1), (value or 2) // 2], float: [(value or 1) * 2, 0.5]}.get(kind, [])


FIELDS = [(name, field.name) for name in GENERATED for field in dataclasses.fields(TASKS[name])]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_field_is_noticed(name, field, opened):
    rows = {"seq_len": ROWS.get(name, 512)}
    base = opened(name, **rows)
    task = base.config.task
    for value in others(typing.get_type_hints(type(task))[field], getattr(task, field)):
        try:
            other = opened(name, task=dataclasses.replace(task, **{field: value}), **rows)
        except ValueError:
            continue
        if len(other.val) != len(base.val) or rows_of(take(other, 1)) != rows_of(take(base, 1)):
            return
    pytest.fail(f"{name}.{field} changes no row; use it, or take it away")


@pytest.mark.parametrize("name", GENERATED)
def test_nothing_held_out(name, opened):
    data = opened(name, task=TASKS[name](val_rows=0))
    assert len(data.val) == 0
    assert_same([data.whole()], take(data, 1))
    with pytest.raises(ValueError, match=rf"{name}\.val_rows=-1 must be a whole number from 0"):
        TASKS[name](val_rows=-1)


@pytest.mark.parametrize("name", GENERATED)
def test_rows_come_again_in_another_order(name, opened):
    """Of five rows, in batches of eight."""
    said = lambda batches: [row.tobytes() for batch in batches for row in np.stack([batch.tokens, batch.targets], 1)]
    endless, data = opened(name), opened(name, task=TASKS[name](val_rows=20, train_rows=5))
    rows = said(take(data, 5))
    epochs = [rows[first : first + 5] for first in range(0, 40, 5)]
    assert data.num_train_rows == 5 and {*rows} == {*said([endless.read_train(np.arange(5))])}
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len({*map(tuple, epochs)}) > 4
    with pytest.raises(DataError, match=r"task\.train_rows was None and is 5"):
        data.train().set_state(json.loads(json.dumps(endless.train().get_state())))

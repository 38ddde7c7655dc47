"""Mixtures: shares, limits and curricula are exact, rows are those of the sources, on any hosts and after any resume."""

import itertools
import json

import numpy as np
import pytest

from plait.data.config import DataConfig, DataError
from plait.data.loader import build_data
from plait.data.mixture.config import SourceConfig
from plait.data.mixture.schedule import Schedule, Share
from plait.data.tasks.base import TASKS
from tests.data.conftest import make_texts


def brute(shares, shift, rows):
    """The sources of rows one by one, after the definition."""
    found, first, done = [], 0, [0] * len(shares)
    before = None
    for row in range(rows):
        weights = [
            0.0 if share.limit == count else [w for f, w in share.weights if f <= row][-1]
            for share, count in zip(shares, done, strict=True)
        ]
        if weights != before:
            first, before = row, weights
        place = (int(f"{row - first:040b}"[::-1], 2) ^ shift) / 2**40
        ends = list(itertools.accumulate(weight / sum(weights) for weight in weights))
        source = next(i for i, end in enumerate(ends) if place < end and weights[i])
        found.append(source)
        done[source] += 1
    return found


SHARES = [
    Share(((0, 0.7), (1000, 0.1))),
    Share(((0, 0.299),), limit=400),
    Share(((0, 0.001), (1000, 0.5), (2000, 0.0))),
]


def test_rows_are_those_of_the_definition():
    schedule = Schedule(SHARES, 3)
    rows = np.arange(3000)
    source, number = schedule.locate(rows)
    assert source.tolist() == brute(SHARES, schedule._shift, 3000)
    for index in range(3):
        np.testing.assert_array_equal(number[source == index], np.arange((source == index).sum()))
    some = np.array([0, 999, 1000, 1700, 2999])
    np.testing.assert_array_equal(schedule.locate(some), (source[some], number[some]))
    assert schedule.counts(1700) == np.bincount(source[:1700], minlength=3).tolist()
    assert Schedule([Share(((0, 2.0),), limit=7), Share(((0, 1.0),), limit=9)], 0).num_rows == 16


def test_shares_hold_in_every_stretch_and_small_sources_get_theirs():
    weights = [0.6, 0.389, 0.01, 0.001]
    source = Schedule([Share(((0, weight),)) for weight in weights], 1).sources(np.arange(20_000))
    for begin, size in ((0, 20_000), (3000, 1000), (12_345, 2000)):
        counts = np.bincount(source[begin : begin + size], minlength=4)
        assert (np.abs(counts - size * np.array(weights)) < 6).all()  # far below the noise of draws: 15 of 1000
    assert np.diff(np.flatnonzero(source == 3)).max() < 3000


@pytest.fixture
def texts(tmp_path):
    """Two sources of different letters, 3:1 in size."""
    for name, count, change in (("web", 90, str.upper), ("code", 30, str.lower)):
        lines = [json.dumps({"text": change(text)}) for text in make_texts(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def build(texts, rows=None, run="run", sources=None, **fields):
    given = {"web": {"weight": 1.0}, "code": {"weight": 3.0}} if sources is None else sources
    table = {
        name: SourceConfig(**{**({} if "task" in one else {"source": str(texts / f"{name}.jsonl")}), **one})
        for name, one in given.items()
    }
    fields = {"tokenizer": "byte", "seq_len": 32, "batch_size": 8, "val_fraction": 0.1, **fields}
    return build_data(DataConfig(sources=table, **fields), texts / run, rows=rows)


def of_web(batch):
    """Which rows have capitals alone."""
    text = [bytes(row[row < 256].astype(np.uint8)) for row in batch.targets]
    assert all(row == row.upper() or row == row.lower() for row in text)
    return np.array([row == row.upper() for row in text])


def test_shares_over_an_epoch_and_each_row_is_of_its_source(texts):
    data = build(texts)
    steps = data.parts["code"].num_train_rows // 6  # an epoch of it
    batches = [data.read_train(np.arange(8 * n, 8 * n + 8)) for n in range(steps)]
    web = np.concatenate([of_web(batch) for batch in batches])
    np.testing.assert_array_equal(web, np.concatenate([data.sources(n) == 0 for n in range(steps)]))
    tokens = np.concatenate([batch.loss_mask.sum(1) for batch in batches])
    assert abs(tokens[web].sum() / tokens.sum() - 0.25) < 0.01
    code = np.concatenate([batch.targets for batch in batches])[~web]
    alone = data.parts["code"].read_train(np.arange(len(code)))
    np.testing.assert_array_equal(code, alone.targets)
    plain = build(texts, sources={"web": {}, "code": {}})  # in proportion to their tokens
    sizes = [part.num_train_rows for part in plain.parts.values()]
    off = np.array(plain.schedule.counts(4000)) - 4000 * np.array(sizes) / sum(sizes)
    assert np.abs(off).max() <= 12  # rows; one for each of the 12 bits of 4,000 at most, by the places of van der Corput
    hot = build(texts, sources={"web": {}, "code": {}}, temperature=100.0)
    assert abs(hot.schedule.counts(1000)[0] - 500) < 10


def test_a_resume_on_other_hosts_in_a_curriculum_goes_on_exactly(texts):
    sources = {"web": {"weight": 1.0, "curriculum": "0@6"}, "code": {"weight": 1.0, "max_epochs": 2.0}}
    whole = build(texts, sources=sources).train()
    first = [next(whole) for _ in range(4)]
    state = json.loads(json.dumps(whole.get_state()))
    rest = [next(whole) for _ in range(6)]
    assert of_web(first[0]).sum() == 4 and not of_web(rest[3]).any()
    halves = [build(texts, rows=np.arange(4) + 4 * host, run=f"host{host}", sources=sources).train() for host in (0, 1)]
    for host, half in enumerate(halves):
        half.set_state(state)
        for batch in rest:
            for mine, theirs in zip(next(half), batch):
                np.testing.assert_array_equal(mine, theirs[4 * host : 4 * host + 4])
    other = build(texts, run="other", sources={**sources, "web": {"weight": 2.0, "curriculum": "0@6"}}).train()
    with pytest.raises(DataError, match="belongs to other data: sources was"):
        other.set_state(state)
    for one in (whole, *halves, other):
        one.close()


def test_generated_rows_stand_beside_text_with_ids_of_their_own(texts):
    task = TASKS["mqar"](vocab_size=64, num_kv_pairs=4)
    data = build(texts, sources={"web": {"weight": 1.0}, "recall": {"task": task, "weight": 1.0}})
    assert data.vocab_size == 257 + 64
    batch, source = data.read_train(np.arange(8)), data.sources(0)
    made = batch.tokens[source == 1]
    assert made.min() >= 257 and batch.tokens[source == 0].max() <= 256
    np.testing.assert_array_equal(made - 257, data.parts["recall"].read_train(np.arange(len(made))).tokens - 257)
    val = data.read_val(np.arange(data.num_val_rows))
    assert (val.tokens.max(1) >= 257).sum() == data.parts["recall"].num_val_rows
    with pytest.raises(DataError, match=r"data\.sources\.recall\.max_epochs=2\.0 asks for the number of its rows"):
        build(texts, sources={"web": {"weight": 1.0}, "recall": {"task": task, "weight": 1.0, "max_epochs": 2.0}})


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"web": {"weight": 0.0}, "code": {"weight": 0.0}}, "sources have weights that sum to nothing from step 0 on"),
        ({"web": {"weight": 1.0, "curriculum": "0@5"}}, "sources have weights that sum to nothing from step 5 on"),
        (
            {"web": {"weight": 1.0}, "code": {}},
            r"sources\.code\.weight=None is the number of its tokens, and sources\.web has a weight",
        ),
        ({"web": {"weight": 1.0, "curriculum": "much"}}, "curriculum='much' has 'much', which is no weight and step"),
        ({"web": {"weight": 1.0, "curriculum": "1@5, 2@5"}}, "must have rising steps from 1 on"),
        ({"Web!": {"weight": 1.0}}, "sources has the name 'Web!', which must be letters"),
    ],
    ids=["nothing", "nothing later", "two measures", "no curriculum", "steps", "name"],
)
def test_what_does_not_go_together_is_said(texts, sources, message):
    with pytest.raises(ValueError, match=message):
        build(texts, sources=sources)


def test_sources_of_different_tokenizers_are_refused(texts):
    from plait.data.shards.pieces import cut
    from plait.data.shards.prepared import write_prepared
    from plait.data.shards.shard import make_shard, name_of, read_shard
    from plait.data.sources.source import open_source
    from plait.data.tokenizers.bpe import train_bpe
    from plait.data.tokenizers.tokenizer import ByteTokenizer

    for name, tokenizer in (("web", ByteTokenizer()), ("code", train_bpe(make_texts(20), 260))):
        folder = texts / f"{name}.jsonl.shards"
        tokenizer.save(folder / "tokenizer", tokenizer="byte")
        [piece] = cut(open_source(str(texts / f"{name}.jsonl"), "text"), 1 << 30, tokenizer.fingerprint)
        make_shard(piece, tokenizer, folder / name_of(0))
        write_prepared(folder, name, tokenizer, [read_shard(folder / name_of(0))])
    sources = {name: {"source": str(texts / f"{name}.jsonl.shards")} for name in ("web", "code")}
    with pytest.raises(DataError, match=r"data\.sources\.web and data\.sources\.code have shards of different tokenizers"):
        build(texts, sources=sources)
    one = build(texts, sources={"web": sources["web"], "code": {}}, run="both")  # text beside shards
    assert one.parts["code"].tokenizer.fingerprint == ByteTokenizer().fingerprint

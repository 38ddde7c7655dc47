"""Shards: the same bytes whoever makes them, the same rows for any hosts, every token once an epoch, and errors for what is not whole."""

import dataclasses
import json

import numpy as np
import pytest

from plait.data.batch import Batch
from plait.data.config import DataConfig, DataError
from plait.data.corpus import INDEX, TOKENS
from plait.data.loader import Reading, build_data
from plait.data.shards import rows as rows_module
from plait.data.shards.pieces import cut
from plait.data.shards.prepared import open_prepared, write_prepared
from plait.data.shards.rows import Arc
from plait.data.shards.shard import make_shard, name_of, read_shard
from plait.data.sources.source import open_source
from plait.data.tokenizers.tokenizer import ByteTokenizer
from tests.data.conftest import make_texts


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(200)), "utf-8")
    return path


@pytest.fixture
def prepared(lines, tmp_path):
    """Four shards or more of the lines, and the documents."""
    return make(lines, tmp_path / "tokens", lines.stat().st_size // 4)


def make(source, folder, size, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    pieces = cut(open_source(str(source), "text"), size, tokenizer.fingerprint)
    tokenizer.save(folder / "tokenizer", tokenizer="byte")
    for number, piece in enumerate(pieces):
        make_shard(piece, tokenizer, folder / name_of(number))
    write_prepared(folder, str(source), tokenizer, [read_shard(folder / name_of(i)) for i in range(len(pieces))])
    return folder


def build(source, run, rows=None, **fields):
    fields = {"tokenizer": "byte", "seq_len": 32, "batch_size": 8, "val_fraction": 0.1, **fields}
    return build_data(DataConfig(source=str(source), **fields), run, rows=rows)


def joined(batches):
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches)))


def test_an_epoch_has_every_document_once(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "WINDOW_TOKENS", open_prepared(str(prepared)).meta.num_tokens // 2)  # several windows
    data = build(prepared, tmp_path / "run")
    assert len(open_prepared(str(prepared)).meta.shards) >= 4 and data.num_val_rows
    for number in range(len(open_prepared(str(prepared)).meta.shards)):  # what is held out is found by searching them
        hashes = open_prepared(str(prepared)).open(number)[1]["hash"]
        assert (hashes[1:] >= hashes[:-1]).all()
    epoch = data.num_train_rows
    seen = [data.read_train(np.arange(n * epoch, (n + 1) * epoch)) for n in (0, 1)]
    assert not np.array_equal(seen[0].tokens, seen[1].tokens)
    val = data.read_val(np.arange(data.num_val_rows))
    texts = np.bincount(np.frombuffer("".join(make_texts(200)).encode(), np.uint8), minlength=257)
    texts[256] = 200  # ends
    for one in seen:
        both = joined([one, val])
        np.testing.assert_array_equal(np.bincount(both.targets[both.loss_mask > 0], minlength=257), texts)
    assert 0.02 < val.loss_mask.sum() / texts.sum() < 0.3
    # Any rows alone, as other hosts read them.
    one = np.array([3, epoch - 1, epoch, epoch + 7])
    alone = joined([data.read_train(np.array([i])) for i in one])
    for a, b in zip(data.read_train(one), alone):
        np.testing.assert_array_equal(a, b)


def test_readers_of_a_run_see_what_it_held_out(prepared, lines, tmp_path):
    trained = build(prepared, tmp_path / "run")
    look = lambda source, corpus: build_data(
        trained.config if source == prepared else dataclasses.replace(trained.config, source=str(source)),
        tmp_path / "run",
        reading=Reading(tokenizer=trained.tokenizer, corpus=corpus, scratch=tmp_path / "scratch"),
    )
    again = look(prepared, trained.identity["corpus"])
    for one, other in zip(trained.val[0], again.val[0], strict=True):
        np.testing.assert_array_equal(one, other)
    other = look(prepared, "0" * 16)  # other text than the run's is held out whole
    assert other.facts["num_val_tokens"] == trained.facts["num_train_tokens"] + trained.facts["num_val_tokens"]


def test_what_is_held_out_hangs_on_split_seed_alone(prepared, lines, tmp_path):
    for source in (prepared, lines):
        one, two, other = (
            build(source, tmp_path / "run", seed=seed, split_seed=split) for seed, split in ((1, 5), (2, 5), (1, 6))
        )
        targets = lambda data: np.sort(np.concatenate([b.targets[b.loss_mask > 0] for b in data.val]))
        np.testing.assert_array_equal(targets(one), targets(two))
        assert not np.array_equal(targets(one), targets(other))
        assert not np.array_equal(next(one.train()).tokens, next(two.train()).tokens)


def test_pieces_divide_the_documents_of_a_file(lines, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = make_texts(200)
    table = tmp_path / "all.parquet"
    pq.write_table(pa.table({"text": texts}), table, row_group_size=20)
    for file in (lines, table):
        for size in (file.stat().st_size // 7, 500):
            pieces = cut(open_source(str(file), "text"), size, "")
            assert len(pieces) >= 5
            assert [document.text for piece in pieces for document in piece.source.documents()] == texts


def test_arc_is_what_a_comparison_of_every_hash_gives():
    hashes = np.sort(np.random.default_rng(0).integers(0, 1 << 64, 5000, dtype=np.uint64))
    for seed in range(6):
        arc = Arc.held_out(0.3, seed)
        inside = (hashes - np.uint64(arc.begin)) < np.uint64(arc.length)
        for one, expected in ((arc, inside), (arc.others, ~inside)):
            found = np.zeros(len(hashes), bool)
            for first, stop in one.ranges(hashes):
                found[first:stop] = True
            np.testing.assert_array_equal(found, expected)
    assert Arc.everything().ranges(hashes) == [(0, 5000)] and not Arc.held_out(0, 1).ranges(hashes)


def test_shards_that_are_not_whole_are_named(prepared, tmp_path):
    tokens = prepared / name_of(1) / TOKENS
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=r"shard-00001 is not whole: tokens\.bin has \d+ bytes instead of \d+; delete that folder"
    ):
        build(prepared, tmp_path / "a")
    tokens.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"shard-00001 is not whole: tokens\.bin has changed"):
        build(prepared, tmp_path / "a")
    tokens.write_bytes(whole)
    index = prepared / name_of(0) / INDEX
    raw = bytearray(index.read_bytes())
    raw[-1] ^= 1
    index.write_bytes(raw)
    with pytest.raises(DataError, match=r"shard-00000 is not whole: documents\.npy has changed"):
        data = build(prepared, tmp_path / "b")
        data.read_train(np.arange(data.num_train_rows))
    (prepared / "prepared.json").unlink()
    with pytest.raises(
        DataError, match=r"is not ready: it has shards and no prepared\.json; let `launch.py prepare` go on there"
    ):
        build(prepared, tmp_path / "a")


def test_shards_of_another_tokenizer_are_refused(prepared, tmp_path):
    with pytest.raises(DataError, match=r"has shards of another tokenizer \(data\.tokenizer='byte'\) than data\.tokenizer='bpe'"):
        build(prepared, tmp_path / "a", tokenizer="bpe", vocab_size=300)
    meta = dataclasses.replace(open_prepared(str(prepared)).meta, tokenizer="0" * 64, check=None)
    from plait.data.cache import checksum

    text = json.dumps(dataclasses.asdict(dataclasses.replace(meta, check=checksum(meta))))
    (prepared / "prepared.json").write_text(text)
    with pytest.raises(DataError, match="is another tokenizer than the one that made the shards"):
        build(prepared, tmp_path / "b")

"""The tokenised corpus is exact, used again only when whole, and split so that nothing is on both sides."""

import json
import logging

import numpy as np
import pytest

from plait.data.config import DataError
from plait.data.corpus import INDEX, META, TOKENS, load_corpus, split, train_tokenizer
from plait.data.packing import Documents
from plait.data.sources.source import open_source
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.data.tokenizers.tokenizer_json import JsonTokenizer
from tests.data.conftest import make_texts


@pytest.fixture
def source(corpus_folder):
    return open_source(str(corpus_folder), "text")


def texts_of(corpus, tokenizer):
    docs = corpus.documents
    return [tokenizer.decode(docs.tokens[s : s + n]) for s, n in zip(docs.starts, docs.lengths)]


def test_corpus_holds_every_document_and_counts_its_bytes(source, tmp_path):
    bpe, fingerprint = train_tokenizer(source, 300)
    for tokenizer in (ByteTokenizer(), bpe):
        corpus = load_corpus(source, tokenizer, tmp_path / "cache")
        assert texts_of(corpus, tokenizer) == make_texts(60)
        assert corpus.documents.tokens.dtype == np.uint16
        assert corpus.meta.num_documents == len(corpus.documents) == 60
        assert corpus.meta.num_tokens == corpus.documents.num_tokens == len(corpus.documents.tokens)
        assert corpus.meta.num_bytes == corpus.meta.num_token_bytes == sum(len(text.encode()) for text in make_texts(60))
        assert corpus.meta.fingerprint == fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one a tokenizer, and nothing left behind


def test_large_vocabulary_is_stored_in_32_bits(source, tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        changes = "one byte each"
        bytes_per_token = np.ones(70_000, np.int32)

        def encode_batch(self, texts):
            return [ids + 69_000 for ids in super().encode_batch(texts)]

    corpus = load_corpus(source, Wide(), tmp_path)
    assert corpus.documents.tokens.dtype == np.uint32
    assert corpus.documents.tokens.min() >= 69_000


def test_vocabulary_of_a_large_corpus_is_learned_from_a_sample(source, monkeypatch):
    whole, fingerprint = train_tokenizer(source, 300)
    monkeypatch.setattr("plait.data.corpus.TRAIN_BYTES", source.num_bytes // 4)
    seen = []
    monkeypatch.setattr("plait.data.corpus.train_bpe", lambda texts, vocab_size: seen.extend(texts) or whole)
    assert train_tokenizer(source, 300)[1] == fingerprint  # of all of it
    assert 3 < len(seen) < 35


def test_cache_is_used_again_and_follows_the_files(source, tmp_path, monkeypatch, corpus_folder):
    load_corpus(source, ByteTokenizer(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", lambda self, texts: pytest.fail("tokenised again"))
        load_corpus(source, ByteTokenizer(), tmp_path)
    (corpus_folder / "more.txt").write_text("more")
    changed = load_corpus(open_source(str(corpus_folder), "text"), ByteTokenizer(), tmp_path)
    assert changed.meta.num_documents == 61


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TOKENS).write_bytes((f / TOKENS).read_bytes()[:-10]), "bytes instead of"),
        (lambda f: flip(f / TOKENS), "tokens.bin has changed"),
        (lambda f: flip(f / INDEX), "documents.npy has changed"),
        (lambda f: (f / META).write_text("{"), "is not JSON"),
        (lambda f: (f / META).write_text("{}"), "is missing"),
        (lambda f: (f / META).write_text("[]"), "must be an object"),
        (lambda f: (f / TOKENS).unlink(), "No such file"),
        (lambda f: (f / META).write_text((f / META).read_text().replace('"format": 1', '"format": 0')), "another format"),
    ],
    ids=["truncated", "tokens changed", "index changed", "meta cut", "meta empty", "meta list", "tokens gone", "other format"],
)
def test_damaged_cache_is_rebuilt_with_a_warning(source, tmp_path, caplog, damage, message):
    before = load_corpus(source, ByteTokenizer(), tmp_path)
    tokens = np.array(before.documents.tokens)
    (folder,) = tmp_path.glob("tokens-*")
    damage(folder)
    with caplog.at_level(logging.WARNING, "plait.data"):
        after = load_corpus(source, ByteTokenizer(), tmp_path)
    assert message in caplog.text
    assert "tokenising again" in caplog.text
    np.testing.assert_array_equal(after.documents.tokens, tokens)


def test_interrupted_tokenising_leaves_nothing(tmp_path, corpus_folder):
    (corpus_folder / "z.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"z\.txt is not UTF-8"):
        load_corpus(open_source(str(corpus_folder), "text"), ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_second_of_two_writers_takes_the_work_of_the_first(source, tmp_path, monkeypatch):
    """Another process finishes the same corpus while this one is tokenising."""
    encode = ByteTokenizer.encode_batch

    def encode_late(self, texts):
        monkeypatch.setattr(ByteTokenizer, "encode_batch", encode)
        load_corpus(source, ByteTokenizer(), tmp_path)
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode_late)
    corpus = load_corpus(source, ByteTokenizer(), tmp_path)
    assert corpus.meta.num_documents == 60
    assert len(list(tmp_path.glob("*tokens-*"))) == 1


def test_cache_that_cannot_be_written_says_so(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot hold tokens-\w+: .*; set data\.cache_dir"):
        load_corpus(source, ByteTokenizer(), tmp_path / "file" / "cache")


def test_lossy_tokenizer_is_warned_about(source, tmp_path, caplog):
    bpe, _ = train_tokenizer(source, 300)
    content = json.loads(bpe.text)
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "law"}, "content": ""}
    with caplog.at_level(logging.WARNING, "plait.data"):
        corpus = load_corpus(source, JsonTokenizer(json.dumps(content), eos="<|endoftext|>"), tmp_path)
    assert corpus.meta.num_token_bytes < corpus.meta.num_bytes
    assert "changes the text (normalizer Replace)" in caplog.text


def documents_of(lengths, hashes=None):
    lengths = np.array(lengths, np.int64)
    hashes = np.arange(len(lengths)) if hashes is None else np.array(hashes)
    return Documents(np.arange(lengths.sum()), np.cumsum(lengths) - lengths, lengths, hashes.astype(np.uint64))


def spans(documents):
    return [tok for s, n in zip(documents.starts, documents.lengths) for tok in range(s, s + n)]


@pytest.mark.parametrize("lengths", [[10] * 200, [1000], [5, 900, 20], [3] * 10, [1, 2]], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_split_parts_every_token_once_and_near_the_share(lengths, seed):
    documents = documents_of(lengths)
    train, val = split(documents, 0.1, seed)
    assert sorted(spans(train) + spans(val)) == list(range(sum(lengths)))
    assert 0.1 * sum(lengths) <= val.num_tokens + len(lengths)
    assert val.num_tokens <= 0.2 * sum(lengths) + len(lengths)
    assert (train.lengths > 0).all()
    assert (val.lengths > 0).all()


def test_split_of_many_documents_keeps_them_whole_and_follows_the_seed():
    documents = documents_of([10] * 200)
    held = {seed: set(split(documents, 0.1, seed)[1].starts.tolist()) for seed in (0, 1)}
    assert len(held[0]) == len(held[1]) == 20
    assert held[0] != held[1]
    assert (split(documents, 0.1, 0)[1].lengths == 10).all()


def test_split_does_not_hang_on_file_order():
    documents = documents_of([10] * 200)
    order = np.random.default_rng(0).permutation(200)
    assert set(split(documents, 0.1, 0)[1].hashes) == set(split(documents.take(order), 0.1, 0)[1].hashes)


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_document_are_on_one_side(seed):
    train, val = split(documents_of([10] * 300, hashes=np.arange(300) % 100), 0.105, seed)
    assert len(val) > 0
    assert not set(train.hashes) & set(val.hashes)


def test_one_long_document_is_held_out_at_its_end():
    train, val = split(documents_of([1000]), 0.02, 0)
    assert (train.lengths.tolist(), val.starts.tolist(), val.lengths.tolist()) == ([980], [980], [20])


def test_split_of_nothing():
    train, val = split(documents_of([10, 10]), 0.0, 0)
    assert (len(train), len(val)) == (2, 0)

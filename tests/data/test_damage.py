"""Damaged files: whatever is cut, flipped or of another type is read, made again, or refused in a DataError that names the file."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data.config import DataConfig, DataError
from plait.data.corpus import INDEX, META, TOKENS
from plait.data.loader import build_data
from plait.data.sources.source import open_source
from plait.data.tokenizers.bpe import train_bpe
from plait.data.tokenizers.files import load_tokenizer
from plait.data.tokenizers.tokenizer import META_FILE, TOKENIZER_FILE
from tests.data.conftest import make_texts

ROUNDS = [pytest.param(range(12), id="few"), pytest.param(range(12, 400), id="many", marks=pytest.mark.slow)]
VALUES = [None, True, -1, 10**9, 10**30, 1.5, "", "x", [], {}, [None], {"a": 1}, "O", "\ud800"]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A file cut, with flipped bits, with bytes put in, or with a part of it twice."""
    place, kind = rng.randrange(len(raw) + 1), rng.randrange(4)
    if kind == 0:
        return raw[:place]
    if kind == 1:
        flipped = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return raw[:place] + rng.randbytes(rng.randint(1, 40)) + raw[place:]
    return raw[:place] + raw[rng.randrange(len(raw)) :]


def changed(tree, rng: random.Random):
    """A JSON tree with one value in it of another type."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.8:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        copy = tree.copy()
        copy[key] = changed(tree[key], rng)
        return copy
    return rng.choice(VALUES)


def write_all(folder):
    """A file of each format."""
    texts = make_texts(20)
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    folder.mkdir()
    for name, content in {
        "a.txt": texts[0].encode(),
        "b.jsonl": lines,
        "c.json": json.dumps([{"text": text} for text in texts]).encode(),
        "d.txt.gz": gzip.compress(texts[1].encode()),
        "e.jsonl.bz2": bz2.compress(lines),
        "f.json.xz": lzma.compress(lines),
        "g.jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
    }.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.table({"text": texts}), folder / "h.parquet")


@pytest.mark.parametrize("seeds", ROUNDS)
def test_damaged_corpus_is_read_or_refused_by_name(tmp_path, seeds):
    folder = tmp_path / "corpus"
    write_all(folder)
    assert len(list(open_source(str(folder), "text").documents())) == 2 + 6 * 20
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for seed in seeds:
            file.write_bytes(damaged(whole, random.Random(f"{file.name} {seed}")))
            try:
                list(open_source(str(folder), "text").documents())
            except DataError as error:
                assert str(file) in str(error), (file.name, seed)
        file.write_bytes(whole)


@pytest.mark.parametrize("seeds", ROUNDS)
def test_damaged_tokenizer_is_used_or_refused_by_name(tmp_path, seeds):
    whole = train_bpe(make_texts(20), 280).text
    file = tmp_path / TOKENIZER_FILE
    for seed in seeds:
        rng = random.Random(seed)
        if seed % 2:
            file.write_bytes(damaged(whole.encode(), rng))
        else:
            file.write_text(json.dumps(changed(json.loads(whole), rng)), "utf-8")
        try:
            tokenizer = load_tokenizer(tmp_path)
            if not tokenizer.changes:
                assert tokenizer.num_bytes(tokenizer.encode("the naïve law")) == len("the naïve law".encode())
        except DataError as error:
            assert str(file) in str(error), seed


@pytest.mark.parametrize("seeds", ROUNDS)
def test_damaged_cache_is_made_again_and_a_damaged_description_is_named(tmp_path, seeds):
    (tmp_path / "c.txt").write_text("some words to be held in a cache. " * 40)
    config = DataConfig(
        source=str(tmp_path / "c.txt"), vocab_size=270, seq_len=16, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    expected = build_data(config, tmp_path / "run").identity
    (tokens,), (words,) = (list((tmp_path / "cache").glob(pattern)) for pattern in ("tokens-*", "bpe-*"))
    for file in (tokens / META, tokens / INDEX, tokens / TOKENS, words / META_FILE, words / TOKENIZER_FILE):
        whole = file.read_bytes()
        for seed in seeds:
            rng = random.Random(f"{file.name} {seed}")
            content = damaged(whole, rng)
            if seed % 2 and file.suffix == ".json":
                content = json.dumps(changed(json.loads(whole), rng)).encode()
            file.write_bytes(content)
            try:
                found = build_data(config, tmp_path / f"run-{file.name}-{seed}").identity
                assert found == expected or (file.parent == words and content != whole), (file.name, seed)
            except DataError as error:
                raise AssertionError((file.name, seed, str(error))) from error
            file.write_bytes(whole)
    meta = tmp_path / "run" / "tokenizer" / META_FILE
    for seed in seeds:
        meta.write_text(json.dumps(changed(json.loads((words / META_FILE).read_text()), random.Random(seed))))
        try:
            assert build_data(config, tmp_path / "run").identity == expected
        except DataError as error:
            assert "tokenizer" in str(error), seed

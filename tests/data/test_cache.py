"""Folders made by several processes at once: one wins, killed ones leave nothing for ever, living ones are left alone."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from plait.data import cache as caches
from plait.data.cache import making, sweep
from plait.data.config import DataConfig
from plait.data.loader import build_data

TOKENISE = """
import sys, time
from plait.data.config import DataConfig
from plait.data.loader import build_data
from plait.data.tokenizers.tokenizer import ByteTokenizer
encode = ByteTokenizer.encode_batch
def slow(self, texts):
    print("tokenising", flush=True)
    time.sleep(float(sys.argv[4]))
    return encode(self, texts)
ByteTokenizer.encode_batch = slow
build_data(DataConfig(source=sys.argv[1], tokenizer="byte", seq_len=16, batch_size=2, cache_dir=sys.argv[2]), sys.argv[3])
"""


def tokenising(corpus, cache, runs, seconds):
    """Processes that are in the middle of tokenising, one a run."""
    words = [sys.executable, "-c", TOKENISE, str(corpus), str(cache)]
    processes = [subprocess.Popen([*words, str(run), str(seconds)], stdout=subprocess.PIPE, text=True) for run in runs]
    for process in processes:
        assert process.stdout.readline() == "tokenising\n"
    return processes


def build(corpus, cache, run):
    return build_data(DataConfig(source=str(corpus), tokenizer="byte", seq_len=16, batch_size=2, cache_dir=str(cache)), run)


def test_killed_writer_is_swept_and_a_living_one_is_not(corpus_folder, tmp_path):
    cache = tmp_path / "cache"
    dead, living = tokenising(corpus_folder, cache, [tmp_path / "dead", tmp_path / "living"], 3)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2
    build(corpus_folder, cache, tmp_path / "mine")
    left = {path.name for path in cache.iterdir() if path.name.startswith(".")}
    assert len(left) == 2, "the folder and the lock of the living writer"
    assert living.wait() == 0
    assert [path.name[:7] for path in cache.iterdir()] == ["tokens-"]


@pytest.mark.slow
def test_kills_while_two_race_for_one_cache(corpus_folder, tmp_path):
    cache = tmp_path / "cache"
    for attempt in range(20):
        pair = tokenising(corpus_folder, cache, [tmp_path / f"{attempt}-{i}" for i in range(2)], 2)
        time.sleep(0.11 * attempt)
        pair[attempt % 2].send_signal(signal.SIGKILL)
        assert pair[(attempt + 1) % 2].wait() == 0
        pair[attempt % 2].wait()
        data = build(corpus_folder, cache, tmp_path / "mine")
        assert data.facts["num_documents"] == 60
        assert [path.name[:7] for path in cache.iterdir()] == ["tokens-"]
        for path in cache.iterdir():
            path.rename(tmp_path / f"done-{attempt}")


def test_writer_of_another_machine_is_dead_after_a_day_of_silence(tmp_path, monkeypatch):
    """Its lock may not show here."""
    partial, owner = tmp_path / ".tokens-a-1", tmp_path / ".tokens-a-1.owner"
    partial.mkdir()
    owner.write_text("plait writer on another")
    sweep(tmp_path)
    assert partial.exists()
    monkeypatch.setattr(caches, "ABANDONED_SECONDS", -1.0)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shared_cache_follows_the_umask(corpus_folder, tmp_path):
    before = os.umask(0o002)
    try:
        config = DataConfig(
            source=str(corpus_folder), vocab_size=300, seq_len=16, batch_size=2, cache_dir=str(tmp_path / "cache")
        )
        build_data(config, tmp_path / "run")
    finally:
        os.umask(before)
    made = [*(tmp_path / "cache").rglob("*"), *(tmp_path / "run").rglob("*")]
    assert len(made) == 10
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o775 if path.is_dir() else 0o664), path


def test_first_whole_folder_stays(tmp_path):
    with making(tmp_path / "a") as late:
        (late / "file").write_text("second")
        with making(tmp_path / "a") as early:
            (early / "file").write_text("first")
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

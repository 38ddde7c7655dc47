"""Small corpora on disk."""

import json
import random
from pathlib import Path

import pytest

WORDS = [
    "the",
    "a",
    "law",
    "people",
    "of",
    "and",
    "war",
    "über",
    "naïve",
    "日本",
    "🙂",
    "don't",
    "1790",
    "\n\n",
    "-",
    "...",
    "river",
    "",
]


def make_texts(count: int, *, seed: int = 0, size: int = 120) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, size))) + f" {i}" for i in range(count)]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Sixty documents of mixed length as one .jsonl."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in make_texts(60)]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder

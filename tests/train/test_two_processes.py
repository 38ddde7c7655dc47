"""Two processes that want one run folder, each round anew, and kills in between: one trains, the other is refused."""

import json
import random
import signal
import time

import pytest

from plait.tests.train.common import launch, write_corpus
from plait.tests.train.pods.pod import SMALL

STEPS = 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_race_for_a_folder(seed, compile_cache, tmp_path):
    """Odd seeds are killed at any time from the start on, which is mostly while the corpus is tokenised into the folder."""
    rng, out = random.Random(seed), tmp_path / "run"
    source = write_corpus(tmp_path / "text", files=30, words=20_000)
    words = [
        "train",
        *SMALL,
        "--data.source",
        source,
        "--data.tokenizer",
        "bpe",
        "--data.vocab-size",
        400,
        "--steps",
        STEPS,
        "--out",
        out,
    ]
    for kills_left in (3, 2, 1, 0):
        both = [launch(*words, "--resume", cache=compile_cache) for _ in range(2)]
        ended = None
        try:
            if kills_left:
                deadline = time.monotonic() + (rng.uniform(1, 10) if seed % 2 else 60)
                before = checkpoints(out)
                while (
                    time.monotonic() < deadline
                    and (seed % 2 or checkpoints(out) == before)
                    and any(p.poll() is None for p in both)
                ):
                    time.sleep(0.01)
                for process in both:
                    if process.poll() is None:
                        process.send_signal(signal.SIGKILL)
            ended = [(process.communicate(timeout=300)[0], process.returncode) for process in both]
        finally:
            for process in both:
                process.kill()
        statuses = sorted(status for _, status in ended)
        refused = [" ".join(text.split()) for text, status in ended if status == 2]
        assert all("is in use: process" in text for text in refused), refused
        if kills_left:
            assert statuses in ([-9, -9], [-9, 2], [0, 2], [0, 0]), ended
        else:
            assert statuses in ([0, 2], [0, 0]), ended  # the second may come when the first is done
        assert not [*(out / "checkpoints").glob("damaged-*")], ended
        check_metrics(out)
    assert checkpoints(out)[-1] == STEPS


def checkpoints(out):
    return sorted(
        int(path.parent.name) for path in (out / "checkpoints").glob("[0-9]*/manifest.json") if path.parent.name.isdigit()
    )


def check_metrics(out):
    """Each step's line once, in order."""
    path = out / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    steps = [line["step"] for line in lines if "loss/train" in line]
    assert steps == list(range(1, len(steps) + 1))

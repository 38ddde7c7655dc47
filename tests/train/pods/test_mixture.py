"""A mixture with a curriculum goes on exactly where another number of hosts has left it."""

import json
import shutil

import pytest

from plait.launch import main
from plait.tests.train.common import write_corpus
from plait.tests.train.pods.pod import SMALL, Pod, statuses
from plait.tests.train.pods.test_pods import assert_like


@pytest.mark.slow
def test_a_mixture_goes_on_with_another_number_of_hosts(compile_cache, tmp_path):
    source = write_corpus(tmp_path / "text")
    words = [
        *(*SMALL, "--data.cache-dir", tmp_path / "cache", "--steps", "12", "--optimizer.eps", "1e-3", "--keep-last", "9"),
        *("--data.sources.web.source", source, "--data.sources.web.weight", "3", "--data.sources.web.curriculum", "1@6"),
        *("--data.sources.copy.task", "copying", "--data.sources.copy.weight", "1"),
    ]
    assert statuses(Pod(1, *words, "--out", tmp_path / "run", devices=2, cache=compile_cache).finish()) == [0]
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert len(steps) > 1 and steps[0] < 6
    for step in steps[1:]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    results = Pod(2, *words, "--out", tmp_path / "run", "--resume", cache=compile_cache).finish()
    assert statuses(results) == [0, 0], results
    assert_like(tmp_path / "run", tmp_path / "whole")
    assert main(["eval", str(tmp_path / "run"), "--batches", "1", "--seq-len", "32,16"]) == 0  # every source of its own
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12 and {"loss/val_source/web", "loss/val_source/copy"} <= last.keys()

"""A small Llama that `transformers` saved, against what lm-evaluation-harness's own model for it finds (`generate.py`)."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from plait.configs.mesh import MeshConfig
from plait.launch import main
from plait.tests.tolerances import assert_close
from plait.train.convert.importing import import_model
from plait.train.convert.options import ImportOptions
from plait.train.harness.asking import Asked, AskOptions
from plait.train.run import opened

GOLDEN = Path(__file__).parent / "golden"
FOUND = json.loads((GOLDEN / "golden.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def run(compile_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "run"
    import_model(GOLDEN / "llama", folder, ImportOptions())
    return folder


def asked_of(run, **options) -> Asked:
    return Asked(opened(run), AskOptions(**options))


def same(kind: str, asked: Asked) -> None:
    """Every request of every task has the answer that was found."""
    for task, requests in FOUND[kind]["requests"].items():
        texts, found = [one["asked"] for one in requests], [one["found"] for one in requests]
        if task == "plait_written":
            assert asked.answers(texts) == found
        elif task == "plait_whole":
            assert_close(np.float32(asked.whole([text for (text,) in texts])), np.float32(found), err_msg=task)
        else:
            ours = asked.after(texts)
            assert_close(np.float32([one.log for one in ours]), np.float32([log for log, _ in found]), err_msg=task)
            assert [one.greedy for one in ours] == [greedy for _, greedy in found], task


def test_plain_requests(run):
    same("plain", asked_of(run))


def test_chats(run):
    """Names of special tokens in a text are those tokens; a system message that the template refuses is left out."""
    pytest.importorskip("jinja2", reason="needs jinja2, of the extra test")
    asked = asked_of(run, chat=True)
    same("chat", asked)
    (first,) = {one["asked"][0] for one in FOUND["chat"]["requests"]["plait_letters"][:1]}
    question = first.removeprefix("<|endoftext|>user: ").removesuffix("\n<|endoftext|>assistant: ")
    said = [{"role": "system", "content": "Say it."}, {"role": "user", "content": question}]
    assert asked.chat is not None and asked.chat(said) == first


def test_on_a_mesh(compile_cache, tmp_path):
    """Eight devices, with rows and tokens over them."""
    import_model(GOLDEN / "llama", tmp_path / "run", ImportOptions(mesh=MeshConfig(data=4, context=2)))
    asked = asked_of(tmp_path / "run")
    requests = FOUND["plain"]["requests"]["plait_last"]
    logs = [one.log for one in asked.after([one["asked"] for one in requests])]
    assert_close(np.float32(logs), np.float32([one["found"][0] for one in requests]))
    requests = FOUND["plain"]["requests"]["plait_written"]
    assert asked.answers([one["asked"] for one in requests]) == [one["found"] for one in requests]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra eval")
@pytest.mark.parametrize("kind", FOUND)
def test_scores_of_the_harness(kind, run, tmp_path, monkeypatch, capsys):
    """Its tasks from local files, by the command."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(GOLDEN)
    out, samples = tmp_path / "found.json", tmp_path / "samples.jsonl"
    names = ",".join(FOUND[kind]["results"])
    words = ["--chat", "--system", "Say it."] if kind == "chat" else []
    command = ["eval", str(run), "--lm-eval", names, "--include-path", "tasks", "--out", str(out), "--samples", str(samples)]
    assert main([*command, *words]) == 0
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    for task, metrics in FOUND[kind]["results"].items():
        assert task in shown
        for name, value in metrics.items():
            assert found["results"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), f"{task} {name}"
    lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    assert {line["task"] for line in lines} == set(FOUND[kind]["results"]) and "doc" in lines[0]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "published", "tokenizer"]
    assert "DISABLE_MULTIPROC" not in os.environ

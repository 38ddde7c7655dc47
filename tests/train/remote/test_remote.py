"""Data, checkpoints and run folders in a store: what is trained there is what is trained here, whatever store and machine do."""

import json
import random
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from plait.configs.experiment import ExperimentConfig
from plait.data.config import DataError
from plait.data.loader import build_data
from plait.data.remote.store import StoreLost
from plait.launch import main
from plait.tests.s3_server import S3Server, slow
from plait.tests.train.common import changed, different_arrays, launch, tiny, write_corpus
from plait.tests.train.test_resume import assert_same_run, flags
from plait.train.loop import train
from plait.train.remote import mirror as mirrors
from plait.train.remote.parts import whole_steps
from plait.train.run_folder import seal
from plait.train.run_folder.going_on import checkpoint_steps

RUN = "s3://bucket/runs/a"
SIZES = {"steps": 24, "checkpoint_every": 8, "eval_every": 12, "eval_batches": 1, "probe_every": 6, "keep_last": 1}


def put(server: S3Server, folder: Path, key: str) -> None:
    """Copies a folder of this machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            server.objects[f"{key}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


def got(objects: dict[str, bytes], folder: Path) -> Path:
    """A folder of this machine with what the store has of the run."""
    shutil.rmtree(folder, ignore_errors=True)
    for key, data in objects.items():
        if key.startswith("runs/a/"):
            path = folder / key.removeprefix("runs/a/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def whole(objects: dict[str, bytes], folder: Path) -> list[int]:
    """The steps of the run in the store, from each of which it can go on: asserts that it can."""
    steps = whole_steps(key.removeprefix("runs/a/") for key in objects if key.startswith("runs/a/"))
    got(objects, folder)
    for step in steps:
        assert seal.damage(folder / "checkpoints" / str(step)) is None
        lines = [
            json.loads(line)["step"]
            for line in (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
        assert set(range(1, step + 1)) <= set(lines), f"checkpoint {step} is there and lines up to {max(lines, default=0)}"
        assert (folder / "config.json").is_file()
    return steps


def snapshot(server: S3Server) -> dict[str, bytes]:
    """What a machine that was lost now would leave, its owner known to be dead."""
    with server.lock:
        return {key: data for key, data in server.objects.items() if "/owner/" not in key}


def experiment(server: S3Server, tmp_path: Path, **changes: object) -> tuple[ExperimentConfig, ExperimentConfig]:
    """The same run here, and with its data and its folder in the store."""
    text = write_corpus(tmp_path / "text")
    put(server, text, "web")
    here = tiny({**SIZES, **changes, "model.num_layers": 1, "data.source": str(text), "out": str(tmp_path / "here")})
    return here, changed(here, {"data.source": "s3://bucket/web/*.txt", "out": RUN})


class Watched:
    """Asked after each step: waits at some until the store has a checkpoint, and keeps what it then holds."""

    def __init__(self, server: S3Server, at: dict[int, int]):
        self.server, self.at, self.kept = server, at, list[dict[str, bytes]]()
        self.steps = tuple(at)

    def __call__(self, step, metrics):
        deadline = time.monotonic() + 30
        while self.at[step] not in whole_steps(name for name in self.server.under("runs/a")):
            assert time.monotonic() < deadline, "no checkpoint in the store"
            time.sleep(0.02)
        self.kept.append(snapshot(self.server))


def test_run_in_a_store_that_fails_goes_on_on_another_machine_as_if_undisturbed(s3, tmp_path, monkeypatch, compile_cache):
    monkeypatch.setattr(mirrors, "_LOOK_SECONDS", 0.05)
    rng = random.Random(0)
    s3.fault = lambda method, key: rng.choice(["500", "drop", "lost", *[None] * 9])  # a quarter of all requests
    here, there = experiment(s3, tmp_path)
    train(here)
    watched = Watched(s3, {13: 8, 20: 16})
    train(there, judge=watched)
    assert whole(snapshot(s3), tmp_path / "whole") == [24]
    for objects, step in zip(watched.kept, (8, 16), strict=True):
        assert whole(objects, tmp_path / "whole")[-1] == step
        shutil.rmtree(tmp_path / "cache")
        s3.objects = dict(objects)
        train(changed(there, {"resume": True}))
        assert_same_run(got(s3.objects, tmp_path / "whole"), Path(here.folder))
        assert (tmp_path / "whole/checkpoints").exists()


def test_store_that_cannot_be_used_is_refused_before_anything_is_done(s3, tmp_path, monkeypatch, capsys):
    put(s3, write_corpus(tmp_path / "text"), "web")

    def refused(*words: str) -> str:
        assert main(["train", "lm_tiny", "--steps", "20", *words]) == 2
        return capsys.readouterr().err

    s3.objects["runs/used/config.json"] = b"{}"
    assert "already holds a run; use --resume" in refused("--out", "s3://bucket/runs/used")
    assert "no such bucket" in refused("--out", "s3://other/run")
    assert "nothing is there" in refused("--data.source", "s3://bucket/wbe", "--out", str(tmp_path / "a"))
    assert "use s3://, gs://, hf://" in refused("--out", "ftp://bucket/run")
    assert "must be on this machine" in _error(["eval", RUN, "--out", "s3://bucket/x.json"], capsys)
    assert "is not a run folder" in _error(["eval", RUN], capsys)
    assert "a commit for every file" in refused("--out", "hf://datasets/me/run")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there are no credentials for it; set AWS_ACCESS_KEY_ID" in refused("--out", "s3://bucket/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "pip install 'plait[remote]'" in refused("--data.source", "s3://bucket/web", "--out", str(tmp_path / "a"))
    assert list(s3.under("runs")) == ["used/config.json"] and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_killed_three_times_and_taken_up_by_machines_that_have_nothing(s3, tmp_path, compile_cache):
    rng = random.Random(3)
    s3.fault = lambda method, key: rng.choice(["500", *[None] * 7])
    here, there = experiment(s3, tmp_path, steps=4000, checkpoint_every=100)
    train(here)
    words, killed = [*flags(there, RUN), "--resume"], []
    while len(killed) < 3:
        before = max(whole_steps(s3.under("runs/a")), default=0)
        process = launch(*words, cache=compile_cache)
        deadline = time.monotonic() + 300
        while max(whole_steps(s3.under("runs/a")), default=0) == before:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint in the store"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        killed.append(max(whole(dict(s3.objects), tmp_path / "whole")))
        shutil.rmtree(tmp_path / "cache")
    process = launch(*words, cache=compile_cache)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"goes on from step {killed[-1]}" in " ".join(output.split())
    assert whole(snapshot(s3), tmp_path / "whole") == checkpoint_steps(Path(here.folder))
    assert_same_run(tmp_path / "whole", Path(here.folder))


@pytest.mark.slow
def test_store_that_is_gone_for_a_while_gets_all_and_one_that_is_gone_for_good_ends_the_run_with_all_of_it_here(
    s3, tmp_path, monkeypatch, compile_cache
):
    monkeypatch.setattr(mirrors, "_LOOK_SECONDS", 0.05)
    here, there = experiment(s3, tmp_path)
    train(here)

    def gone(step, metrics):
        s3.fault = lambda method, key: "drop"
        threading.Timer(20, setattr, (s3, "fault", slow(0.02))).start()

    gone.steps = (10,)
    began = time.monotonic()
    train(there, judge=gone)
    assert time.monotonic() - began > 20
    assert whole(snapshot(s3), tmp_path / "whole") == [24]
    assert_same_run(tmp_path / "whole", Path(here.folder))

    s3.objects = {key: data for key, data in s3.objects.items() if key.startswith("web/")}
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(mirrors, "END_SECONDS", 3.0)
    watched = Watched(s3, {13: 8})

    def for_good(step, metrics):
        watched(step, metrics)
        s3.fault = lambda method, key: "drop"

    for_good.steps = (13,)
    with pytest.raises(StoreLost, match=r"Not pushed: checkpoints/24, .*; all of it is in .*--resume on this machine pushes it"):
        train(there, judge=for_good)
    assert whole(snapshot(s3), tmp_path / "whole") == [8]
    s3.fault = lambda method, key: None
    assert_same_run(Path(there.folder), Path(here.folder))
    s3.objects = snapshot(s3)  # its owner's process has ended, as this one has not
    train(changed(there, {"resume": True}))
    assert whole(snapshot(s3), tmp_path / "whole") == [24]
    assert_same_run(tmp_path / "whole", Path(here.folder))


@pytest.mark.slow
def test_commands_read_a_run_and_shards_in_a_store(s3, tmp_path, monkeypatch, compile_cache, capsys):
    put(s3, write_corpus(tmp_path / "text", files=12), "web")
    data = ["--data.tokenizer", "byte", "--data.vocab-size", "None", "--data.seq-len", "16"]
    for out in ("s3://bucket/tokens", str(tmp_path / "tokens")):
        assert (
            main(
                [
                    "prepare",
                    "lm_tiny",
                    *data,
                    "--data.source",
                    "s3://bucket/web",
                    "--out",
                    out,
                    "--workers",
                    "1",
                    "--shard-mib",
                    "1",
                ]
            )
            == 0
        )
    here = {path.relative_to(tmp_path / "tokens").as_posix() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert here - {"job.json"} == set(s3.under("tokens"))
    assert all(data == (tmp_path / "tokens" / name).read_bytes() for name, data in s3.under("tokens").items())
    rows = [
        build_data(tiny({"data.source": source}).data, tmp_path / f"run-{number}")
        for number, source in enumerate((str(tmp_path / "tokens"), "s3://bucket/tokens"))
    ]
    assert rows[0].identity == rows[1].identity
    assert not different_arrays(*(next(one.train()) for one in rows))
    s3.objects["tokens/shard-00000/tokens.bin"] = s3.objects["tokens/shard-00000/tokens.bin"][:-2]
    with pytest.raises(DataError, match="bytes instead of"):
        build_data(tiny({"data.source": "s3://bucket/tokens"}).data, tmp_path / "run-2")
    _, there = experiment(s3, tmp_path)
    train(there)
    assert main(["eval", RUN, "--batches", "1"]) == 0 and "runs/a/eval_24.json" in s3.objects
    capsys.readouterr()
    assert main(["generate", RUN, "--prompt", "the", "--num-tokens", "5"]) == 0 and capsys.readouterr().out.startswith("the")
    assert main(["report", RUN]) == 0 and "runs/a/report/index.html" in s3.objects
    (tmp_path / "some.txt").write_text("the law of the people " * 20)
    needles = ["--needle.prompts", "1", "--needle.cue", "2", "--needle.answer", "2"]
    assert main(["inspect", RUN, "--text", str(tmp_path / "some.txt"), "--length", "16", *needles]) == 0
    assert any(key.startswith("runs/a/") and key.endswith(".html") and "report/" not in key for key in s3.objects)
    assert main(["convert", "export", RUN, str(tmp_path / "exported")]) == 0
    assert (
        main(
            [
                "train",
                "--init-from",
                RUN,
                "--mesh.data",
                "1",
                "--steps",
                "2",
                "--probe-every",
                "None",
                "--out",
                "s3://bucket/runs/tuned",
            ]
        )
        == 0
    )
    assert whole_steps(s3.under("runs/tuned")) == [2]
    assert main(["train", "--branch", f"{RUN}/checkpoints/24", "--steps", "24", "--out", "s3://bucket/runs/branch"]) == 0
    assert json.loads(s3.objects["runs/branch/branch.json"])["step"] == 24


def _error(words, capsys) -> str:
    assert main(words) == 2
    return capsys.readouterr().err

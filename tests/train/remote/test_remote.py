"""Data, checkpoints and run folders in a store: what is trained there is what is trained here, whatever store and machine do."""

import json
import random
import shutil
import time
from pathlib import Path

from plait.configs.experiment import ExperimentConfig
from plait.launch import main
from plait.tests.s3_server import S3Server
from plait.tests.train.common import changed, tiny, write_corpus
from plait.tests.train.test_resume import assert_same_run
from plait.train.loop import train
from plait.train.remote import mirror as mirrors
from plait.train.remote.parts import whole_steps
from plait.train.run_folder import seal

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
    for objects, steps in zip(watched.kept, ([8], [16])):
        assert whole(objects, tmp_path / "whole") == steps
        shutil.rmtree(tmp_path / "cache")
        s3.objects = dict(objects)
        train(changed(there, {"resume": True}))
        assert_same_run(got(s3.objects, tmp_path / "whole"), Path(here.folder))
        assert (tmp_path / "whole/checkpoints").exists()


def test_store_that_cannot_be_used_is_refused_before_anything_is_done(s3, tmp_path, monkeypatch, capsys):
    put(s3, write_corpus(tmp_path / "text"), "web")

    def refused(*words: str) -> str:
        assert main(["train", "lm_tiny", "--steps", "2", *words]) == 2
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
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    assert "pip install 'plait[remote]'" in refused("--data.source", "s3://bucket/web", "--out", str(tmp_path / "a"))
    assert list(s3.under("runs")) == ["used/config.json"] and not (tmp_path / "a").exists()


def _error(words, capsys) -> str:
    assert main(words) == 2
    return capsys.readouterr().err

"""A trained run folder, each side file of which is damaged in turn: it is opened, or refused in a line that names what is wrong."""

import json
import random
import shutil
from pathlib import Path

import pytest

from plait.tests.train.common import changed, tiny, write_corpus
from plait.train import run as runs
from plait.train.loop import _Loop, train
from plait.train.report import write_report
from plait.train.report.run import facts, load_runs
from plait.train.run_folder import owner

STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_cache):
    """A run of six steps with probes, pictures and checkpoints of steps 2, 4 and 6, and the config that goes on with it."""
    folder = tmp_path_factory.mktemp("damage")
    config = tiny(
        {
            "model.num_layers": 1,
            "steps": STEPS,
            "probe_every": 2,
            "checkpoint_every": 2,
            "keep_last": 3,
            "data.source": str(write_corpus(folder / "text")),
            "data.cache_dir": str(folder / "cache"),
            "out": str(folder / "run"),
        }
    )
    train(config)
    event = {"step": 3, "kind": "loss_spike", "layer": None, "head": None, "value": 1.0, "threshold": 0.5, "message": "m"}
    (folder / "run" / "events.jsonl").write_text(f"{json.dumps(event)}\n" * 2)
    return changed(config, {"resume": True}), folder / "run"


def flipped(content, rng):
    changed = bytearray(content)
    for _ in range(4):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


WAYS = {
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
    "a list": lambda content, rng: b"[]\n",
    "null": lambda content, rng: b"null\n",
    "an empty object": lambda content, rng: b"{}\n",
    "nested deep": lambda content, rng: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda content, rng: b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "noise": lambda content, rng: rng.randbytes(200),
    "zeros at the end": lambda content, rng: content[: len(content) // 2] + bytes(len(content) // 2),
    "bits flipped": flipped,
    "other types": lambda content, rng: content.replace(b"1", b'"1"').replace(b"2", b"true"),
    "numbers too large": lambda content, rng: content.replace(b"1", b"1e400"),
    "not a number": lambda content, rng: content.replace(b" 1", b" NaN"),
    "a folder": None,
    "gone": None,
}
FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "events.jsonl"),
    *("probes/layers.json", "probes/attention.npz", "probes/step_00000004.npz", "owner/00000001.json"),
    *("checkpoints/6/manifest.json", "checkpoints/6/extra/metadata", "checkpoints/6/state/_METADATA", "checkpoints/README.txt"),
    *("checkpoints/6/_CHECKPOINT_METADATA", "checkpoints/6/state/manifest.ocdbt", "checkpoints/6/metrics/metrics"),
)


def damaged(trained, tmp_path, file, way, seed):
    """A copy of the run with one file damaged."""
    config, folder = trained
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    path = out / file
    rng = random.Random(f"{file} {way} {seed}")
    if path.is_file():
        content = path.read_bytes()
        if WAYS[way] is None:
            path.unlink()
        if way == "a folder":
            path.mkdir()
        if WAYS[way] is not None and content:
            path.write_bytes(WAYS[way](content, rng))
    return changed(config, {"out": str(out)}), out


def resume(config, monkeypatch):
    """All that `--resume` reads, without a step."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, "DEAD_SECONDS", 0.2)
        patch.setattr(owner, "_POLL_SECONDS", 0.1)
        patch.setattr(_Loop, "_compile", lambda loop: None)
        patch.setattr(_Loop, "_until_the_end", lambda loop, state, step: (state, loop.config.steps))
        patch.setattr(_Loop, "_picture", lambda loop, state, last: None)
        train(config)


def read(config):
    runs.opened(config.folder)


def check(file, use, *arguments):
    """Success, or an error of bad input that says where."""
    try:
        use(*arguments)
    except ValueError as error:
        names = {Path(file).name, Path(file).parts[0]}
        assert any(name in str(error) for name in names), error
        assert "\n" not in str(error) and len(str(error)) < 1500, error


REPORTED = ("other types", "numbers too large", "bits flipped")
"""What may look like a run to the readers, and is then drawn, which takes long."""
CASES = [(file, way) for file in FILES for way in WAYS]
SOME = set(random.Random(0).sample(CASES, 45))


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_side_file_is_passed_over_or_named(file, trained, tmp_path, monkeypatch):
    """A third of the ways for each file; the others are in the slow one."""
    for way in (way for other, way in CASES if other == file and (other, way) in SOME):
        config, out = damaged(trained, tmp_path / way, file, way, 0)
        check(file, read, config)
        check(file, lambda out: facts(load_runs([out])[0]), out)
        check(file, resume, config, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_side_file_in_every_way(file, seed, trained, tmp_path, monkeypatch):
    for way in WAYS:
        config, out = damaged(trained, tmp_path / way, file, way, seed)
        check(file, read, config)
        check(file, lambda out: facts(load_runs([out])[0]), out)
        if seed == 0 and way in REPORTED and not file.startswith(("checkpoints", "owner")):
            check(file, write_report, [out])
        check(file, resume, config, monkeypatch)
        shutil.rmtree(tmp_path / way)


MANIFESTS = {
    "a list": [],
    "null": None,
    "nothing": {},
    "a file above": {"../metrics": [1, 2]},
    "an absolute path": {"/etc/passwd": [1, 2]},
    "other types": {"state/_METADATA": ["1", 2]},
    "three numbers": {"state/_METADATA": [1, 2, 3]},
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_checkpoint_with_another_manifest_is_set_aside(content, trained, tmp_path, monkeypatch, caplog):
    config, out = damaged(trained, tmp_path, "none", "gone", 0)
    path = out / "checkpoints/6/manifest.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, **content} if content else content))
    caplog.set_level("INFO", logger="plait")
    resume(config, monkeypatch)
    assert (out / "checkpoints/damaged-6").is_dir() and "manifest.json" in caplog.text and "goes on from step 4" in caplog.text


def test_probe_files_that_are_no_steps_or_of_another_shape(trained, tmp_path, monkeypatch):
    config, out = damaged(trained, tmp_path, "none", "gone", 0)
    probes = out / "probes"
    for name in ("step_abc.npz", "step_.npz", "step_99999999999999999999999.npz", "step_²²²²²²²².npz", "step_-0000001.npz"):
        shutil.copy(probes / "step_00000004.npz", probes / name)
    shutil.copy(probes / "attention.npz", probes / "step_00000003.npz")
    resume(config, monkeypatch)
    (run,) = load_runs([out])
    assert run.probes.steps.tolist() == [1, 2, 4, 6] and any("step_00000003.npz" in note for note in run.notes)

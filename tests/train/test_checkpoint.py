"""Checkpoints on their own: what is kept, what is noticed, and what a full disk does."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from plait.tests.train.common import different_arrays
from plait.train import checkpoint
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.run_folder.owner import FolderLost
from plait.train.state import TrainState


def state_of(value: float, size: int = 64) -> TrainState:
    """A state whose every array says `value`."""
    full = lambda *shape: jnp.full(shape, value, jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    params = {"a.kernel": full(size, size), "a.scale": full(size)}
    return TrainState(zero + int(value), params, {"a.u": full(size)}, {"mu": params}, None, zero, zero)


LIKE = state_of(0.0)


@contextlib.contextmanager
def opened(folder, **options):
    checkpoints = Checkpoints(folder, **options)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def saved(folder, losses, **options):
    """Checkpoints of steps 1, 2, ... with these validation losses."""
    with opened(folder, **options) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, state_of(step), {"data": {"step": step}}, loss=loss)
        checkpoints.wait()
        return checkpoints.steps()


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, [None, None], keep_last=2)
    with opened(tmp_path, read_only=True) as checkpoints:
        step, state, extra = checkpoints.restore(LIKE)
        assert (step, extra) == (2, {"data": {"step": 2}}) and different_arrays(state, state_of(2)) == []
        assert checkpoints.restore(LIKE, 1)[0] == 1
        with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2"):
            checkpoints.restore(LIKE, 7)


def test_what_is_saved_is_as_it_was_then_however_late_it_is_written(tmp_path, monkeypatch):
    written = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: (time.sleep(0.05), written(*args, **kwargs))[1])
    extra = {"watchers": {"sources": {"tokens": [3]}}}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), extra, loss=None)
        extra["watchers"]["sources"]["tokens"][0] += 1  # the next step, while it is written
        checkpoints.wait()
        assert checkpoints.restore(LIKE)[2] == {"watchers": {"sources": {"tokens": [3]}}}


def test_average_is_kept_with_the_rest(tmp_path):
    state = dataclasses.replace(state_of(3), ema={"a.kernel": jnp.ones((2, 2)), "a.scale": jnp.ones(2)})
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state, {}, loss=None)
        checkpoints.wait()
        assert different_arrays(checkpoints.restore(state)[1], state) == []


def test_an_array_is_compressed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PART", 4096)
    state = state_of(1)
    saved(tmp_path, [None])
    with opened(tmp_path, read_only=True) as checkpoints:
        assert different_arrays(checkpoints.restore(LIKE)[1], state) == []
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/1/state", "path": "params.a.kernel"},
    }
    array = tensorstore.open(spec, open=True).result()
    assert array.shape == (64, 64)
    assert 4 * np.prod(array.chunk_layout.write_chunk.shape) == 4096


KEPT = {
    "the newest": ([None] * 4, {"keep_last": 2}, [3, 4]),
    "the best beside the newest": ([3.0, 1.0, 2.0, 4.0, 5.0], {"keep_last": 1, "keep_best": 2}, [2, 3, 5]),
    "the best among those that were validated": ([None, 1.0, None, 2.0, None], {"keep_last": 1, "keep_best": 1}, [2, 5]),
    "one that is both": ([3.0, 2.0, 1.0], {"keep_last": 1, "keep_best": 1}, [3]),
    "a loss that is not a number is no best": ([2.0, float("nan"), float("inf"), 3.0], {"keep_last": 1, "keep_best": 1}, [1, 4]),
}


@pytest.mark.parametrize(("losses", "options", "expected"), KEPT.values(), ids=KEPT)
def test_kept(losses, options, expected, tmp_path):
    assert saved(tmp_path, losses, **options) == expected


NAMES = ["lr=[1e-3,3e-4]", "a\\b", "gs:", "a?*{b}", "p%20 #q'$", "ünï\n日本", "dot."]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(name, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / name, target_is_directory=True)
    (tmp_path / name).mkdir()
    assert saved(tmp_path / name / "checkpoints", [1.0, None], keep_last=2) == [1, 2]
    for folder in (tmp_path / name, tmp_path / "link", tmp_path / name / ".." / name):
        with opened(folder / "checkpoints", read_only=True) as checkpoints:
            assert different_arrays(checkpoints.restore(LIKE)[1], state_of(2)) == []
    with opened(tmp_path / "link" / "checkpoints") as checkpoints:
        checkpoints.save(3, state_of(3), {}, loss=None)
        checkpoints.wait()
        assert checkpoints.restore(LIKE)[0] == 3
    assert not list(tmp_path.rglob("damaged-*"))


LOST = {
    "its index": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "its description": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "what goes with it": lambda folder: (folder / "extra" / "metadata").unlink(),
    "arrays": lambda folder: shutil.copytree(folder.parent / "other" / "1" / "state", folder / "state", dirs_exist_ok=True),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_a_hollow_checkpoint_is_an_error_and_gets_no_name(lose, tmp_path, monkeypatch):
    with opened(tmp_path / "other") as checkpoints:
        smaller = dataclasses.replace(state_of(1), buffers={}, optimizer={})
        checkpoints.save(1, smaller, {}, loss=None)
    saved(tmp_path, [None])
    sealing = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda folder, arrays: (lose(folder), sealing(folder, arrays)))
    with pytest.raises(OSError, match=r"cannot be written to .*: 2\.\S+ has (no (state|extra)/|5 of 8 arrays)"):
        saved_next(tmp_path)
    monkeypatch.undo()
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]


def saved_next(folder):
    checkpoints = Checkpoints(folder, keep_last=2)
    try:
        checkpoints.save(2, state_of(2), {}, loss=None)
        checkpoints.wait()
    finally:
        with contextlib.suppress(OSError):
            checkpoints.close()


def test_nothing_is_saved_or_moved_in_a_folder_that_is_lost(tmp_path):
    saved(tmp_path, [None, None], keep_last=2)
    (tmp_path / "2" / "manifest.json").write_text("{")

    def lost():
        raise FolderLost("gone")

    before = files_of(tmp_path)
    with opened(tmp_path, keep_last=2, check=lost) as checkpoints:
        for change in (lambda: checkpoints.save(3, state_of(3), {}, loss=None), lambda: checkpoints.restore(LIKE)):
            with pytest.raises(FolderLost):
                change()
    assert files_of(tmp_path) == before


UNCHECKED = {"manifest.json", "commit_success.txt", "_CHECKPOINT_METADATA"}  # the last two are written as the folder is renamed


def test_every_file_is_in_the_manifest(tmp_path):
    saved(tmp_path, [1.0])
    files = {str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(json.loads((tmp_path / "1" / "manifest.json").read_text())) == files - UNCHECKED


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_one_bit_flipped_in_any_file_is_noticed(tmp_path):
    saved(tmp_path, [None, None], keep_last=2)
    for file in files_of(tmp_path / "2"):
        content = file.read_bytes()
        if not content:
            continue
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with opened(tmp_path, read_only=True) as checkpoints:
            if file.relative_to(tmp_path / "2").as_posix() in UNCHECKED - {"manifest.json"}:
                assert different_arrays(checkpoints.restore(LIKE)[1], state_of(2)) == [], "not needed to restore"
                file.write_bytes(content)
                continue
            assert checkpoints.restore(LIKE)[0] == 1, file
            with pytest.raises(CheckpointError, match="no whole checkpoint: checkpoint 2"):
                checkpoints.restore(LIKE, 2)
        file.write_bytes(content)
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(LIKE)[0] == 2, "and mended again it is used"


def test_reading_moves_and_makes_nothing(tmp_path):
    with opened(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore(LIKE) is None
    assert not (tmp_path / "none").exists()
    saved(tmp_path / "run", [None, None], keep_last=2)
    (tmp_path / "run" / "2" / "manifest.json").write_text("{")
    before = files_of(tmp_path / "run")
    with opened(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.restore(LIKE)[0] == 1
    assert files_of(tmp_path / "run") == before


def test_a_damaged_one_set_aside_makes_room_for_its_step(tmp_path):
    saved(tmp_path, [None, None], keep_last=3)
    for _ in range(2):
        (tmp_path / "2" / "manifest.json").write_text("{")
        with opened(tmp_path, keep_last=3) as checkpoints:
            assert checkpoints.restore(LIKE)[0] == 1
            checkpoints.save(2, state_of(2), {}, loss=None)
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2] and checkpoints.restore(LIKE)[0] == 2
    assert sorted(p.name for p in tmp_path.glob("damaged-*")) == ["damaged-2", "damaged-2-"]


OTHERS = {
    "a wider one": lambda params: {**params, "a.kernel": jnp.zeros((64, 65))},
    "one with a layer more": lambda params: {**params, "b.kernel": jnp.zeros((2, 2))},
    "one with a layer less": lambda params: {"a.scale": params["a.scale"]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_model_is_named_and_nothing_is_set_aside(change, tmp_path):
    saved(tmp_path, [None])
    params = change(LIKE.params)
    other = dataclasses.replace(LIKE, params=params, optimizer={"mu": params})
    with opened(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"/1 is of another model: [ab]\.\w+ is"):
        checkpoints.restore(other)
    assert (tmp_path / "1").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many KiB, on machines where this process may mount one."""
    mounted = []

    def make(kib: int):
        folder = tmp_path / f"disk-{kib}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("this process may not mount a tmpfs to fill")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [200, 220, 240, 260, 300])
def test_full_disk_is_an_os_error_and_earlier_checkpoints_stay(kib, small_disk):
    """Wherever in a checkpoint the room ends. A state takes some 35 KiB compressed or not, beside its metadata."""
    folder = small_disk(kib) / "checkpoints"
    rng = np.random.default_rng(0)  # random numbers do not compress
    states = {}
    with pytest.raises(OSError, match=r"cannot be written to .*(No space left|RESOURCE_EXHAUSTED)"):
        checkpoints = Checkpoints(folder, keep_last=99)
        try:
            for step in range(1, 30):
                noise = {name: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for name, p in LIKE.params.items()}
                states[step] = dataclasses.replace(state_of(step), params=noise)
                checkpoints.save(step, states[step], {}, loss=None)
            checkpoints.wait()
        finally:
            with contextlib.suppress(OSError):
                checkpoints.close()
    with opened(folder, read_only=True) as checkpoints:
        kept = checkpoints.steps()
        assert kept and max(kept) < 29
        for step in kept:
            assert different_arrays(checkpoints.restore(LIKE, step)[1], states[step]) == []

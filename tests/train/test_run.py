"""Run folders: who may start in one, and how it is opened afterwards."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from plait.configs import codec
from plait.models.mixers.moh import MoHConfig
from plait.models.mixers.sparse.moa import MoAConfig
from plait.tests.train.common import changed, tiny
from plait.train import loop
from plait.train import run as runs
from plait.train.checkpoint import CheckpointError, Checkpoints
from plait.train.loop import train
from plait.train.run_folder import contents


@pytest.fixture
def config(corpus, tmp_path):
    return tiny({"data.source": str(corpus), "out": str(tmp_path / "run"), "optimizer.ema": 0.9})


def test_new_folder_is_free_and_claiming_makes_nothing(config, tmp_path):
    assert runs.claim(config) is False and runs.claim(changed(config, {"resume": True})) is False
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_the_rules_of_a_plan_and_not_its_file(config, tmp_path, monkeypatch):
    plan = tmp_path / "plan.json"
    plan.write_text('{"alphas": [[1, 2]], "betas": [[0.25, 0.5]]}')
    moa = MoAConfig(num_heads=2, head_dim=16, plan=str(plan))
    mixers = {"moa": moa, "moh+moa": MoHConfig(mixer=moa)}
    monkeypatch.setattr(loop, "_Loop", lambda *_: _Trained())
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, pattern="moa,moh+moa", mixers=mixers)))
    plan.unlink()
    saved = codec.load(type(config), setup_folder(config) / contents.CONFIG).model.mixers
    for kept in (saved["moa"], saved["moh+moa"].mixer):
        assert (kept.plan, kept.alphas, kept.betas) == (None, (1.0, 2.0), (0.25, 0.5))


class _Trained:
    """In place of training."""

    def run(self):
        return None


LOST = {
    "config.json": (["config.json"], "holds .*metrics.jsonl.* of a run and no config.json"),
    "checkpoints": (["checkpoints"], r"checkpoints/ is not there: bring it back \(is it mounted\?\)"),
    "what is in checkpoints": (["checkpoints/4", "checkpoints/README.txt"], "checkpoints/ is empty"),
}


@pytest.mark.parametrize(("lost", "message"), LOST.values(), ids=LOST)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_has_lost_a_part_is_no_new_run(lost, message, resume, trained):
    config, _ = trained
    folder = setup_folder(config)
    contents.mark(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 4}\n')
    for name in lost:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    if not resume and lost != ["config.json"]:
        message = "already holds a run; use --resume"
    with pytest.raises(runs.RunError, match=message):
        train(changed(config, {"resume": resume}))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(trained):
    config, _ = trained
    folder = setup_folder(config)
    contents.mark(folder)
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    (folder / "checkpoints" / "4").rename(folder / "checkpoints" / "damaged-4")
    with pytest.raises(runs.RunError, match="checkpoints/ holds none that is whole"):
        runs.claim(changed(config, {"resume": True}))


def test_cache_and_data_may_lie_elsewhere_when_a_run_goes_on(trained, tmp_path):
    config, _ = trained
    assert runs.claim(changed(config, {"resume": True, "data.cache_dir": "elsewhere", "data.source": "moved"}))
    with pytest.raises(runs.RunError, match=r"started with another config: data\.seed: 0 -> 1"):
        runs.claim(changed(config, {"resume": True, "data.seed": 1}))


def test_files_of_others_do_not_make_a_folder_a_run(config):
    folder = setup_folder(config)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "slurm-1.out").write_text("queued")
    (folder / "metrics.jsonl").touch()
    assert runs.claim(config) is False


def test_default_folder_is_named_after_the_preset():
    assert tiny().folder == "runs/tiny" and tiny({"out": "elsewhere"}).folder == "elsewhere"


@pytest.fixture
def trained(config):
    """A run with one checkpoint whose average differs from its parameters."""
    setup = runs.set_up(config)
    codec.save(config, setup_folder(config) / contents.CONFIG)
    state = setup.fresh()
    state = dataclasses.replace(state, ema={name: p + 1 for name, p in state.params.items()})
    checkpoints = Checkpoints(setup_folder(config) / contents.CHECKPOINTS)
    checkpoints.save(4, state, {}, loss=None)
    checkpoints.close()
    return config, state


def setup_folder(config):
    from pathlib import Path

    return Path(config.folder)


def test_opened_run_has_the_averaged_parameters(trained):
    config, state = trained
    run = runs.opened(config.folder)
    assert run.step == 4 and run.program.config.data == config.data
    for name, value in state.ema.items():
        np.testing.assert_array_equal(run.params[name], value)


def test_moved_run_opens_where_it_is(trained, tmp_path):
    config, _ = trained
    moved = tmp_path / "moved"
    setup_folder(config).rename(moved)
    run = runs.opened(moved)
    assert run.step == 4 and run.program.config.folder == str(moved)
    assert not setup_folder(config).exists(), "reading a moved run makes nothing at its old place"


READ_ON = {
    "its own mesh": ({"mesh.data": 2}, {"data": 2, "fsdp": 1, "tensor": 1}),
    "its own sharded mesh": ({"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}),
    "one of more devices than there are": ({"mesh.data": 1, "mesh.fsdp": 64}, {"data": 4, "fsdp": 1, "tensor": 1}),
    "all devices, which do not divide its batch": ({"mesh.data": None}, {"data": 4, "fsdp": 1, "tensor": 1}),
}


@pytest.mark.parametrize(("changes", "shape"), READ_ON.values(), ids=READ_ON)
def test_run_of_another_mesh_can_be_read(changes, shape, trained):
    config, _ = trained
    codec.save(changed(config, changes), setup_folder(config) / contents.CONFIG)
    run = runs.opened(config.folder)
    assert {axis: size for axis, size in run.program.mesh.shape.items() if axis in shape or size > 1} == shape


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(runs.RunError, match=r"is not a run folder: it has no config.json"):
        runs.opened(tmp_path)


def test_step_that_is_not_there(trained):
    config, _ = trained
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; it has 4"):
        runs.opened(config.folder, 9)


def test_files_are_whole_or_absent(tmp_path):
    runs.write_json(tmp_path / "deep" / "x.json", {"a": 1})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]

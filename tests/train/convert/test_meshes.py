"""Wherever a model lies, on one device, on eight or on two hosts: the same arrays in, the same bytes out, or nothing at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from plait.configs.mesh import MeshConfig
from plait.data.tokenizers.tokenizer import ByteTokenizer
from plait.launch import main
from plait.models.lm import learned_shapes
from plait.tests.train.common import different_arrays, launch
from plait.train.convert import weights
from plait.train.convert.exporting import export_model
from plait.train.convert.fitting import Source, part_shape
from plait.train.convert.importing import import_model
from plait.train.convert.options import ImportOptions
from plait.train.convert.reading import CONFIG
from plait.train.convert.weights import ONE
from plait.train.run import opened

GOLDEN = Path(__file__).parent / "golden"
ALONE = MeshConfig(data=1)
SPREAD = {
    "llama": MeshConfig(data=2, fsdp=2, tensor=2),
    "qwen3_moe": MeshConfig(data=2, fsdp=2, expert=2),
    "qwen3_next": MeshConfig(data=2, fsdp=2, tensor=2),
    "mamba2": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Makes the folder of a published model of bytes, a golden one's config with changes and random weights."""

    def published(name, **changes):
        folder = tmp_path_factory.mktemp(name)
        fields = json.loads((GOLDEN / name / CONFIG).read_text()) | {"vocab_size": 264, **changes}
        (folder / CONFIG).write_text(json.dumps(fields))
        source = Source.of(folder)
        lines, shapes, rng = source.family.table(source.model), learned_shapes(source.model), np.random.default_rng(0)
        tensors = {}
        for line in lines:
            made = line.transform.shapes([part_shape(place, shapes) for place in line.places])
            tensors |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in zip(line.tensors, made, strict=True)}
        save_file(tensors, folder / ONE)
        ByteTokenizer().save(folder)
        return folder

    return published


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arrays(run):
    trained = opened(run)
    return trained.params, trained.buffers


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("qwen3_next", "qwen3_moe") else n for n in SPREAD]
)
def test_one_device_and_eight_give_the_same_bytes(name, published, tmp_path):
    folder = published(name)
    for where, mesh in {"one": ALONE, "eight": SPREAD[name]}.items():
        import_model(folder, tmp_path / where, ImportOptions(mesh=mesh))
        export_model(tmp_path / where, tmp_path / f"{where}_out", shard_bytes=30_000)
    first, second = (contents(tmp_path / f"{where}_out") for where in ("one", "eight"))
    assert len([name for name in first if name.endswith(".safetensors")]) > 1 and first == second
    assert different_arrays(arrays(tmp_path / "one"), arrays(tmp_path / "eight")) == []


@pytest.fixture
def hosts(compile_cache, monkeypatch):
    """Runs a conversion on two hosts of so many devices; gives the exit status and what was said."""

    def hosts(*words, devices=1):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0")
        process = launch("convert", *words, "--hosts.local", 2, cache=compile_cache)
        said, _ = process.communicate(timeout=240)
        return process.returncode, said

    return hosts


TWO_HOSTS = {
    "a part of every array": ("llama", {}, 1, {"fsdp": 2}),
    "layers": ("llama", {"num_hidden_layers": 4}, 1, {"pipeline": 2}),
    "experts": ("qwen3_moe", {}, 2, {"expert": 2, "fsdp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case == "experts" else pytest.param(case, marks=pytest.mark.slow) for case in TWO_HOSTS]
)
def test_two_hosts_take_in_and_give_out_what_one_does(case, published, hosts, tmp_path):
    name, changes, devices, axes = TWO_HOSTS[case]
    folder = published(name, **changes)
    import_model(folder, tmp_path / "one", ImportOptions(mesh=ALONE))
    mesh = [word for axis, size in axes.items() for word in (f"--mesh.{axis}", size)]
    status, said = hosts("import", folder, tmp_path / "two", "--mesh.data", 1, *mesh, devices=devices)
    assert status == 0 and said.count("try launch.py eval") == 1, said
    assert different_arrays(arrays(tmp_path / "one"), arrays(tmp_path / "two")) == []
    assert contents(tmp_path / "one" / "published") == contents(tmp_path / "two" / "published")
    status, said = hosts("export", tmp_path / "two", tmp_path / "two_out", devices=devices)
    assert status == 0, said
    export_model(tmp_path / "one", tmp_path / "one_out")
    assert contents(tmp_path / "one_out") == contents(tmp_path / "two_out")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one_out", "two_out"}


def test_what_is_wrong_with_a_model_ends_all_hosts(published, hosts, tmp_path):
    folder = published("llama")
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "num_hidden_layers": 4}))
    status, said = hosts("import", folder, tmp_path / "run", "--mesh.fsdp", 2)
    assert status == 2 and "missing tensors: model.layers.3." in said and "Traceback" not in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_an_export_with_nothing_written(published, tmp_path, monkeypatch, capsys):
    import_model(published("llama"), tmp_path / "run", ImportOptions(mesh=ALONE))

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    assert main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors cannot be written (" in error and "No space left on device" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_conversions_say_that_they_run_in_one_process(capsys):
    assert main(["convert", "reshape", "a", "b", "students", "--hosts.local", "2"]) == 2
    assert "convert reshape runs in one process, import and export on several hosts" in capsys.readouterr().err

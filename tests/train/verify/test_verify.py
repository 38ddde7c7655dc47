"""`launch.py verify`: what is right passes, what is broken is named, and the rest goes on."""

import dataclasses
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plait.configs.experiment import ExperimentConfig
from plait.configs.mesh import MeshConfig
from plait.kernels import registered
from plait.kernels.short_conv import _op as conv
from plait.launch import main
from plait.train.loop import Result
from plait.train.mesh import make_mesh
from plait.train.verify import collectives, devices, speed, verifying
from plait.train.verify import training as short_training
from plait.train.verify.agreement import agreement
from plait.train.verify.findings import failed
from plait.train.verify.peers import peers
from plait.train.verify.rooflines import Peak, Shape
from plait.train.verify.training import training_config
from plait.train.verify.trials import LONG, TIMED, TRIALS

SMALL = Shape(2, 40, 2, 8, 64, group=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for sizes in (verifying.TRIED, verifying.TIMED_AT):
        monkeypatch.setitem(sizes, "cpu", SMALL)
    monkeypatch.setattr(devices, "measured_peak", lambda dtype: Peak(1e12, 1e9))


def break_conv(monkeypatch, run):
    """The convolution's chunked form gives `run(call, its results)`."""
    whole = conv.implementations["chunked"]
    monkeypatch.setitem(conv.implementations, "chunked", dataclasses.replace(whole, run=lambda call: run(call, whole.run(call))))


def test_every_op_with_a_kernel_is_tried():
    everywhere = registered(everywhere=True)
    with_kernels = {op for op, names in registered().items() if names != everywhere[op]}
    assert with_kernels <= {trial.op for trial in TRIALS.values()}


def test_long_rows_are_tried_where_a_kernel_does_a_part_of_them_at_once():
    shape = verifying.LONG_AT
    assert {trial.op for trial in LONG.values()} == {"attention", "decay", "delta_rule"}
    (ids,) = np.asarray(LONG["attention, several tiles"].draw(shape, "bfloat16")["segments"])
    assert ids[0] == ids[3071] == 1, "the third tile of queries sees all of the first of keys"
    assert ids[-1] == 3, "the fourth holds several documents"
    found = list(agreement(LONG, SMALL._replace(length=48), ("float32",)))
    assert [one.status for one in found if one.by == "chunked"] == ["passed"] * len(LONG)


def test_what_is_right_passes_and_is_written(tmp_path, capsys):
    out = tmp_path / "v"
    assert main(["verify", "--only", "agreement,speed", "--ops", "short_conv", "--repeats", "2", "--out", str(out)]) == 0
    told = json.loads((out / "verify.json").read_text())
    assert {one["part"] for one in told["findings"]} == {"agreement with the reference", "speed of the ops"}
    tried = [one for one in told["findings"] if "agreement" in one["part"]]
    assert [one["what"] for one in tried] == ["short_conv, float32", "short_conv, documents, float32"]
    assert all(0 < one["numbers"]["error"] < one["numbers"]["allowed"] < 1e-4 for one in tried)
    assert "0 failed" in capsys.readouterr().out and [path.name for path in out.iterdir()] == ["verify.json"]
    assert main(["verify", "--only", "devices", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_where_nothing_differs_a_value_and_its_bound_are_named(tmp_path):
    out = tmp_path / "v"
    assert main(["verify", "--only", "agreement", "--ops", "topk_blocks", "--out", str(out)]) == 0
    for one in json.loads((out / "verify.json").read_text())["findings"]:
        assert one["numbers"]["error"] == 0 < one["numbers"]["allowed"]
        assert "allowed, in the value " in one["detail"]


def test_verifications_that_begin_at_once_have_a_folder_each(tmp_path):
    gate, ended, made = threading.Barrier(4), threading.Barrier(4), []

    def make():
        gate.wait()
        with verifying._taken(tmp_path / "verify" / "cpu-20260101-000000", usual=True) as (folder, _):
            made.append(folder)
            ended.wait()

    threads = [threading.Thread(target=make) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(path.name for path in made) == ["cpu-20260101-000000", *(f"cpu-20260101-000000-{n}" for n in (2, 3, 4))]


def test_of_verifications_in_one_empty_folder_one_goes_on(tmp_path):
    gate, ended, made, refused = threading.Barrier(4), threading.Barrier(4), [], []

    def make():
        gate.wait()
        try:
            with verifying._taken(tmp_path, usual=False) as (folder, _):
                made.append(folder)
                ended.wait()
        except ValueError as error:
            refused.append(str(error))
            ended.wait()

    threads = [threading.Thread(target=make) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert made == [tmp_path] and len(refused) == 3 and all("is in use: process" in one for one in refused)


def test_a_folder_in_which_a_verification_was_killed_is_free(tmp_path):
    out, command = tmp_path / "v", ["verify", "--only", "devices", "--out"]
    killed = "import os, signal\nfrom plait.launch import main\nfrom plait.train.verify import verifying\n"
    killed += "verifying.devices = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", f"{killed}main({[*command, str(out)]})"], check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL and [path.name for path in out.iterdir()] == ["owner"]
    (out / "training").mkdir()
    (out / "training" / "metrics.jsonl").write_text("of the one before")
    with verifying._taken(out, usual=False) as (folder, run):
        assert folder == out and run == out / "training-2", "what was written stays"
        assert main([*command, str(out)]) == 2, "which this process has"
    assert main([*command, str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["training", "verify.json"]
    assert (out / "training" / "metrics.jsonl").read_text() == "of the one before"


def test_a_training_that_a_signal_stops_is_not_judged_and_leaves_the_folder_free(tmp_path, monkeypatch):
    command = ["verify", "--only", "training", "--steps", "4", "--out", str(tmp_path)]

    def stopped(config: ExperimentConfig) -> Result:
        Path(config.folder).mkdir(parents=True)
        return Result(Path(config.folder), 2, False, {})

    monkeypatch.setattr(short_training, "train", stopped)
    assert main(command) == 75 and sorted(path.name for path in tmp_path.iterdir()) == ["owner", "training"]
    assert main(command) == 75 and (tmp_path / "training-2").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "training"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert main(["verify", "--only", "devices", "--out", str(tmp_path)]) == 2
    assert "is there already; give a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


BROKEN = {
    "a wrong result": lambda call, found: (found[0] * 1.001, found[1]),
    "a wrong state": lambda call, found: (found[0], found[1] + 1e-3),
    "a wrong gradient": lambda call, found: (found[0] - 1e-3 * (call.x - jax.lax.stop_gradient(call.x)), found[1]),
    "no number": lambda call, found: (found[0] / 0, found[1]),
}


@pytest.mark.parametrize("how", [*BROKEN, "a crash"])
def test_what_is_broken_is_named_with_status_1_and_the_rest_goes_on(how, monkeypatch, tmp_path, capsys):
    def crash(call, found):
        raise RuntimeError("the compiler gave up\nat length")

    break_conv(monkeypatch, BROKEN.get(how, crash))
    assert main(["verify", "--only", "agreement,devices", "--ops", "short_conv", "--out", str(tmp_path / "v")]) == 1
    findings = json.loads((tmp_path / "v" / "verify.json").read_text())["findings"]
    bad = [one for one in findings if one["status"] == "failed"]
    assert [(one["what"], one["by"]) for one in bad] == [
        (w, "chunked") for w in ("short_conv, float32", "short_conv, documents, float32")
    ]
    assert how != "a crash" or bad[0]["detail"] == "RuntimeError: the compiler gave up"
    assert findings[-1]["part"] == "devices"
    assert "failed: short_conv, float32, chunked" in capsys.readouterr().err


def test_results_that_change_from_call_to_call_are_named(monkeypatch, tmp_path):
    count = iter(range(100))
    noise = lambda: np.float32(1 + 1e-7 * next(count))
    break_conv(
        monkeypatch,
        lambda call, found: (
            found[0] * jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential"),
            found[1],
        ),
    )
    trial = dataclasses.replace(TRIALS["short_conv"], learns=False)
    monkeypatch.setitem(TRIALS, "short_conv", trial)
    assert main(["verify", "--only", "agreement", "--ops", "short_conv", "--out", str(tmp_path / "v")]) == 1
    assert "different bits" in (tmp_path / "v" / "verify.json").read_text()


def test_a_peer_that_fails_is_told_and_the_others_are_timed(monkeypatch):
    def broken(x):
        raise RuntimeError("no such engine")

    monkeypatch.setattr(speed, "peers", lambda name: {**peers(name), "other": broken})
    found = list(speed.speed({"attention": TIMED["attention"]}, SMALL, "float32", Peak(1e9, 1e9), 2))
    assert [(one.by, one.status) for one in found] == [("chunked", "passed"), ("jax.nn xla", "passed"), ("other", "failed")] * 2
    assert all(one.numbers["seconds_low"] <= one.numbers["seconds_middle"] for one in found if one.status == "passed")


@pytest.mark.parametrize("unordered", [(), ("chunked",)])
def test_gradients_may_change_where_a_kernel_adds_them_in_no_fixed_order(unordered, monkeypatch, tmp_path):
    count = iter(range(100))
    noise = lambda: np.float32(1 + 1e-7 * next(count))
    noisy = jax.custom_vjp(lambda x: x)
    of_noise = jax.ShapeDtypeStruct((), jnp.float32)
    noisy.defvjp(lambda x: (x, None), lambda _, d: (d * jax.pure_callback(noise, of_noise, vmap_method="sequential"),))
    break_conv(monkeypatch, lambda call, found: (noisy(found[0]), found[1]))
    monkeypatch.setitem(TRIALS, "short_conv", dataclasses.replace(TRIALS["short_conv"], unordered=unordered))
    status = main(["verify", "--only", "agreement", "--ops", "short_conv", "--out", str(tmp_path / "v")])
    told = (tmp_path / "v" / "verify.json").read_text()
    bits = [one["status"] for one in json.loads(told)["findings"] if one["what"] == "short_conv, float32"]
    assert bits == (["passed"] if unordered else ["failed"]) and ("different bits" in told or status == 0)


def test_exchanges_along_every_axis_are_held_against_numpy(monkeypatch):
    monkeypatch.setattr(collectives, "NUMBERS", 64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    found = list(collectives.collectives(mesh, 1))
    assert len(found) == 2 * len(collectives.EXCHANGES)
    assert not failed(found)
    name = "to the next (ppermute)"
    run, expected, sent = collectives.EXCHANGES[name]
    monkeypatch.setitem(collectives.EXCHANGES, name, (lambda x, axis: -run(x, axis), expected, sent))
    assert [one.what for one in failed(collectives.collectives(mesh, 1))] == [name] * 2


def test_a_device_with_other_bits_is_named(monkeypatch):
    digests = iter(["a", "a", "b", *"a" * 5])
    monkeypatch.setattr(devices, "_digest", lambda dtype: next(digests))
    assert [one.what for one in failed(devices.devices("float32"))] == ["device 2, cpu"]


BAD = {
    "an op": (["--ops", "atention"], "ops='atention' is no op that is tried; use some of attention"),
    "a part": (["--only", "agreement,sped"], "only='sped' is no part; use some of devices"),
    "a mesh": (["--mesh.data", "3", "--mesh.fsdp", "5"], "mesh.data=3"),
    "a preset": (["--preset", "lm_tny"], "did you mean 'lm_tiny'"),
    "a preset's place": (["lm_tiny"], "use --preset lm_tiny"),
    "an option": (["--model.patern", "gla"], "--model.patern"),
    "no option at all": (["--device", "foo"], "'launch.py train lm_tiny --help' lists them"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_anything_is_tried(words, message, tmp_path, capsys):
    out = tmp_path / "v"
    assert main(["verify", *words, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_model_for_accelerators_is_a_valid_run(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = training_config(None, [], tmp_path, 20)
    assert (config.name, config.data.batch_size, config.steps) == ("hybrid_340m", 32, 20)


def test_a_short_training_tells_loss_speed_and_attention(tmp_path, capsys):
    words = ["--mesh.data", "1", "--data.batch-size", "2", "--steps", "8", "--only", "training"]
    assert main(["verify", *words, "--out", str(tmp_path / "v")]) == 0
    (found,) = json.loads((tmp_path / "v" / "verify.json").read_text())["findings"]
    assert found["numbers"]["loss_last"] < found["numbers"]["loss_first"]
    assert {"attn/entropy_mean", "attn/sink_rate", "throughput/tokens_per_second"} <= found["numbers"].keys()
    assert "delta_rule chunked" in found["detail"]


def test_kept_files_fill_the_table_of_proofs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("docs_tables", Path(__file__).parents[3] / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    break_conv(monkeypatch, BROKEN["a wrong state"])
    assert main(["verify", "--only", "agreement", "--ops", "short_conv", "--out", str(tmp_path / "v")]) == 1
    (tmp_path / "v" / "verify.json").rename(tmp_path / "one.json")
    assert re.fullmatch(r"cpu, JAX [\d.]+, [\d-]{10}: 0 of 2 trials pass", tables.on_hardware("short_conv", "chunked", tmp_path))
    assert tables.on_hardware("decay", "chunked", tmp_path) == "not yet"

"""Devices are shared out before anybody looks at one."""

import os

import pytest

from plait.train.sweep.workers import devices


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the given device files and variables."""
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_DEV", tmp_path)

    def make(files=(), **variables):
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def test_one_worker_gets_all(machine):
    machine([f"nvidia{i}" for i in range(8)])
    assert devices.shares(1) == [devices.Share()]


def test_gpus(machine):
    machine([*(f"nvidia{i}" for i in range(12)), "nvidiactl"])
    assert [one.variables["CUDA_VISIBLE_DEVICES"] for one in devices.shares(4)] == ["0,1,2", "3,4,5", "6,7,8", "9,10,11"]
    with pytest.raises(ValueError, match="workers=5 must divide the 12 GPUs here; use one of 1, 2, 3, 4, 6, 12"):
        devices.shares(5)
    machine(CUDA_VISIBLE_DEVICES="3,GPU-7f")
    assert [one.variables["CUDA_VISIBLE_DEVICES"] for one in devices.shares(2)] == ["3", "GPU-7f"]


@pytest.mark.parametrize(
    "files", [["accel0", "accel1", "accel2", "accel3"], ["vfio/4", "vfio/5", "vfio/6", "vfio/7", "vfio/vfio"]]
)
def test_tpu_chips(files, machine):
    machine(files)
    found = devices.shares(4)
    assert [one.variables["TPU_VISIBLE_CHIPS"] for one in found] == ["0", "1", "2", "3"]
    assert found[0].variables["TPU_PROCESS_BOUNDS"] == found[0].variables["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,1,1"
    with pytest.raises(ValueError, match="workers=2 must be 1, with all TPU chips, or 4, with one each"):
        devices.shares(2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to cores")
def test_cores(machine):
    machine(["nvidia0", "nvidia1"], JAX_PLATFORMS="cpu")
    cores = os.sched_getaffinity(0)
    assert frozenset().union(*(one.cores for one in devices.shares(len(cores)))) == cores
    many = devices.shares(2 * len(cores) + 1)
    assert all(len(one.cores) == 1 for one in many) and not any(one.variables for one in many)

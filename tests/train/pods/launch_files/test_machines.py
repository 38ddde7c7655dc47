"""Targets: hosts, chips and names of every generation."""

import re

import pytest

from plait.kernels.chips import CHIPS
from plait.train.pods.launch_files.machines import GENERATIONS, machines


@pytest.mark.parametrize(
    ("target", "hosts", "chips", "devices", "accelerator_type", "machine_type"),
    [
        ("v4:4x4x4", 16, 4, 64, "v4-128", "ct4p-hightpu-4t"),
        ("v5e:1x1", 1, 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5e:2x4", 1, 8, 8, "v5litepod-8", "ct5lp-hightpu-8t"),
        ("v5e:16x16", 64, 4, 256, "v5litepod-256", "ct5lp-hightpu-4t"),
        ("v5p:2x2x1", 1, 4, 4, "v5p-8", "ct5p-hightpu-4t"),
        ("v5p:8x8x8", 128, 4, 512, "v5p-1024", "ct5p-hightpu-4t"),
        ("v5p:16x16x24", 1536, 4, 6144, "v5p-12288", "ct5p-hightpu-4t"),
        ("v6e:16x16", 64, 4, 256, "v6e-256", "ct6e-standard-4t"),
        ("tpu7x:4x4x4", 16, 4, 128, None, "tpu7x-standard-4t"),
        ("h100:8x8", 8, 8, 64, None, "a3-megagpu-8g"),
        ("h100x64", 8, 8, 64, None, "a3-megagpu-8g"),
        ("h200:4x8", 4, 8, 32, None, "a3-ultragpu-8g"),
        ("b200:128x8", 128, 8, 1024, None, "a4-highgpu-8g"),
    ],
)
def test_machines_are_those_of_the_documentation(target, hosts, chips, devices, accelerator_type, machine_type):
    found = machines(target)
    assert (found.hosts, found.chips_per_host, found.devices, found.accelerator_type) == (hosts, chips, devices, accelerator_type)
    assert found.node()[1] == machine_type


def test_every_compile_target_has_machines():
    assert GENERATIONS.keys() == CHIPS.keys()


@pytest.mark.parametrize(
    ("target", "slices", "message"),
    [
        ("v5:16x16", 1, "did you mean"),
        ("a100:8x8", 1, "target='a100:8x8' is unknown"),
        ("v5e", 1, "must be v5e:SHAPE"),
        ("v5e:16", 1, "is no slice of a v5e pod"),
        ("v5e:3x5", 1, "1x1, 2x2, 2x4"),
        ("v5p:8x8", 1, "is no slice of a v5p pod"),
        ("v5p:8x4x4", 1, "as in v5p:4x4x8"),
        ("v5p:16x16x32", 1, "has 8192 chips, and a slice of v5p at most 6144"),
        ("h100:8x4", 1, "must be hosts of 8 GPUs"),
        ("cpu:8", 1, "is this machine"),
        ("h100:8x8", 2, "slices=2 is for TPUs"),
        ("v5e:2x2", 2, "must have more than one host each"),
        ("v5e:4x4", 0, "slices=0 must be at least 1"),
    ],
)
def test_target_that_is_none(target, slices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        machines(target, slices)

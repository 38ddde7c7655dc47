"""Accelerators by JAX's device kinds."""

from types import SimpleNamespace

import pytest

from plait.kernels.chips import chip_of, peak_flops


@pytest.mark.parametrize(
    ("kind", "generation", "peak"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5e", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU7x", "tpu7x", 1153e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H100 PCIe", "h100", 756e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA B200", "b200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", None, 312e12),
        ("cpu", None, None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, generation, peak):
    chip = chip_of(kind)
    assert (chip.generation if chip else None) == generation
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak

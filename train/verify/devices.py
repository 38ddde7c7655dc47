"""What each device at hand reaches, and whether all give the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from plait.kernels.target import current
from plait.train.verify.agreement import first_line
from plait.train.verify.findings import Finding
from plait.train.verify.rooflines import Peak, measured_peak

PART = "devices"


def devices(dtype: str) -> Iterator[Finding]:
    """A finding for each device of this process: product rate and bandwidth, and the bits of one product."""
    digests: dict[str, int] = {}
    chip = current()
    for device in jax.local_devices():
        what = f"device {device.id}, {device.device_kind}"
        try:
            with jax.default_device(device):
                peak, digest = measured_peak(dtype), _digest(dtype)
        except Exception as error:
            yield Finding(part=PART, what=what, status="failed", detail=first_line(error))
            continue
        digests.setdefault(digest, device.id)
        same = len(digests) == 1 or digest == next(iter(digests))
        numbers = {"flops": peak.flops, "bytes_per_second": peak.bandwidth}
        if chip is not None:
            numbers |= {"flops_share": peak.flops / chip.flops, "bandwidth_share": peak.bandwidth / chip.memory_bandwidth}
            of = f" ({100 * numbers['flops_share']:.0f}% and {100 * numbers['bandwidth_share']:.0f}% of the data sheet)"
        else:
            of = " (no data sheet of this device is known)"
        detail = f"{peak.flops / 1e12:.3g} TFLOP/s in {dtype}, {peak.bandwidth / 1e9:.3g} GB/s{of}"
        if not same:
            detail = f"one product gives other bits than on device {next(iter(digests.values()))}; {detail}"
        yield Finding(part=PART, what=what, status="passed" if same else "failed", detail=detail, numbers=numbers)


def peak_here(dtype: str) -> Peak:
    """That of the data sheet, of one JAX device; of an unknown one, what it reaches."""
    chip = current()
    return measured_peak(dtype) if chip is None else Peak(chip.flops, chip.memory_bandwidth)


def _digest(dtype: str) -> str:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((512, 512)), dtype) for _ in range(2))
    return hashlib.sha256(np.asarray(jax.jit(jnp.matmul)(a, b)).tobytes()).hexdigest()

"""A plan: a step compiled for a target, and where it does not fit, changes that would."""

from __future__ import annotations

import dataclasses
import time

from plait.configs.experiment import ExperimentConfig
from plait.configs.vocabulary import with_vocabulary
from plait.train.pods.plan.compiled.compiling import standard_error
from plait.train.pods.plan.compiled.kernel_cycles import KernelCycles
from plait.train.pods.plan.search import find_fixes
from plait.train.pods.plan.step_plan import Plan, check_batch, compile_plan, prepare
from plait.train.pods.plan.topology import Target, describe_devices


def make_plan(config: ExperimentConfig, target: Target, *, exact: bool = False) -> Plan:
    """Compiles the step of `config` for `target`, and where it does not fit, looks for what would.

    Args:
        exact: each kernel of it is also compiled by itself, for an estimate of its own.

    Raises:
        ValueError: the target, mesh, model and batch do not go together; nothing was compiled.
    """
    start = time.monotonic()
    config = with_vocabulary(config)
    check_batch(config, target)
    with standard_error():  # libtpu's notes that this is no TPU
        devices = describe_devices(target)
    step = prepare(config, target, devices)
    plan = compile_plan(step, target, start, KernelCycles(target) if exact else None)
    if plan.fits:
        return plan
    fixes = find_fixes(step, target, plan.memory)
    return dataclasses.replace(plan, fixes=fixes, total_seconds=time.monotonic() - start)

"""Optimizers, one file each, and how a run gets its own."""

from __future__ import annotations

import functools

import optax

from plait.configs.optimizer import OptimizerConfig, Parameters
from plait.train.optimizers.precision import in_float32
from plait.train.optimizers.schedule import make_schedule


def make_optimizer(config: OptimizerConfig, steps: int, parameters: Parameters) -> optax.GradientTransformation:
    """Clipping and the optimizer of `config`, in float32. Raises ValueError where a parameter is not what its role asks for."""
    tx = config.build(functools.partial(make_schedule, config, steps), parameters)
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return in_float32(tx, config.moment_dtype)

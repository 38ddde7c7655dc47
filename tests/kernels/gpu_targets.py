"""Descriptions of GPUs for ahead-of-time compiles, by the name of the target."""

from plait.train.pods.plan.gpu_descriptions import GPU_DESCRIPTIONS as TARGETS

__all__ = ["TARGETS"]

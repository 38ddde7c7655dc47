"""On which mesh axes a logical axis lies."""

import math

import jax

from plait.train.mesh import RULES


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis, as `plait.train.mesh.RULES` has them."""
    rule = RULES[name]
    return (rule,) if isinstance(rule, str) else rule or ()


def ways(mesh: jax.sharding.Mesh, name: str) -> int:
    """In how many parts a mesh divides a logical axis."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name))

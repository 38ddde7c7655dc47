"""Block selection on parts of sequences: every device selects for its own queries, among the blocks of the whole rows, which it has."""

from collections.abc import Callable
from typing import Any

from plait.kernels.context import ContextRule, Parts


def _run(op: Callable[[Any], Any], parts: Parts, call: Any) -> Any:
    return op(call)


CONTEXT = ContextRule(_run)

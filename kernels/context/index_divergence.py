"""The indexer's divergence on parts of sequences: every device has its own queries, and gathers the keys of all."""

from collections.abc import Callable
from typing import Any

from plait.kernels.context import ContextRule, Parts


def _run(op: Callable[[Any], Any], parts: Parts, call: Any) -> Any:
    return op(call.on_keys(parts.gather))


CONTEXT = ContextRule(_run)

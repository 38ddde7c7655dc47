"""What a command ends with. Needs no JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable

from plait.train.pods.hosts.failure import TrainingFailed


def exit_status(command: Callable[[], int | None]) -> int:
    """The exit status of a command, after its error is printed: 0 done, 2 bad input, 1 a failed run, or what it returns."""
    try:
        return command() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, OSError) as error:
        print(f"error: {error}; what was saved before stays", file=sys.stderr)
        return 1

"""What a command ends with. Needs no JAX."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from plait.configs.errors import is_bad_input
from plait.train.pods.hosts.failure import TrainingFailed

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after a Ctrl-C that ended what was in progress."""
_UNEXPECTED = "This is no bad input but a fault of plait or of a library; what was saved before stays. Please report it with the lines above."


def exit_status(command: Callable[[], int | None]) -> int:
    """The exit status of a command, after its error is printed: 0 done, 2 bad input, 1 a failed run, or what it returns. A Ctrl-C that
    nobody caught ends the process.

    Raises:
        ValueError: one that is no bad input, with a note that says so.
    """
    try:
        return command() or 0
    except ValueError as error:
        if not is_bad_input(error):
            error.add_note(_UNEXPECTED)
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        end_now()
    except (TrainingFailed, OSError) as error:
        print(f"error: {error}; what was saved before stays", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says it
            raise
        what = (str(error) or "this process").splitlines()[0][:300]
        print(
            f"error: not enough memory: {what}; ask for less at once, or use a larger machine; what was saved before stays",
            file=sys.stderr,
        )
        return 1


def end_now() -> NoReturn:
    """Ends the process with status 130 after a Ctrl-C. Python itself would wait for threads of libraries, that compile as a rule."""
    with contextlib.suppress(OSError, ValueError):
        print("interrupted: what was saved before stays", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)

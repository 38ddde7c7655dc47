"""Where commands write: what they found to standard output, what happens on the way to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from typing import TextIO

from rich.console import Console, ConsoleDimensions

_NATURAL = 1 << 16
"""Columns where nobody looks: tables are as wide as they are."""
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that move, erase or command a terminal; tabs and newlines are left."""


class _Results(Console):
    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        return super().size if self.is_terminal else ConsoleDimensions(_NATURAL, 25)


console = _Results(soft_wrap=True, markup=False, emoji=False, highlight=False)
"""Of results."""
notes = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
"""Of everything else: one, so that lines go above the live one."""


class Lines(logging.Handler):
    """Writes log records to `notes`, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        notes.print(level + self.format(record), style=_STYLES.get(record.levelno))


def write_text(text: str) -> None:
    """Writes a text to standard output: its bytes and nothing else, or to a terminal what it can show of it, and a newline."""
    if sys.stdout.isatty():
        show_text(text)
        return
    sys.stdout.flush()
    with contextlib.suppress(AttributeError):  # a stream in memory has no bytes
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
        return
    sys.stdout.write(text)


def write_lines(text: str) -> None:
    """Writes lines to standard output, the last one ended too."""
    write_text(text if sys.stdout.isatty() else f"{text}\n")


def show_text(text: str) -> None:
    """Prints a text, a control character as `\\x1b`."""
    print(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


def prepare_streams() -> None:
    """Standard output and error that take every character and are always there: what they cannot show they show escaped."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by whoever started this: the number must not become that of a file of the run
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
            setattr(sys, name, stream)
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

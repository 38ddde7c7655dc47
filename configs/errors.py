"""Which errors are bad input. Needs nothing but the standard library."""

from __future__ import annotations

import dis

_PACKAGE = __name__.partition(".")[0]


def is_bad_input(error: ValueError) -> bool:
    """Whether a `raise` of this package raised it: a ValueError of a library, or of Python itself, is a fault of the program."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    code = trace.tb_frame.f_code
    ours = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
